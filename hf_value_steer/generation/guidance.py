"""Stable value guidance as a method: when bridges are made anew, from what, and who sees them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_value_steer.backbone.parts import decoder_layers, refuse_other_backbone
from hf_value_steer.backbone.points import layer_point
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.guide import GuidanceConfig
from hf_value_steer.errors import MismatchError, ScoringError, UnsupportedError
from hf_value_steer.files.kept import given_or_loaded
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.state import Reading
from hf_value_steer.generation.validation import refuse_unguidable
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.guidance.steered import BridgeState, bridged
from hf_value_steer.hosts.transformers import attention_of


# Verified against an oracle in tests/parity/test_guidance.py.
GUIDED = frozenset({"gemma3_text", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})
_ATTENTION = ("sdpa", "eager")  # whose masks can be widened


def load_module(config: GuidanceConfig, model: PreTrainedModel) -> GuidanceModule:
    """Load the module that `config` names if need be, and check that it fits `model`.

    Returns:
        Its shadow, in evaluation mode: the module itself stays as it is.

    Raises:
        ValueError: if there is no module, or the model cannot be guided by it.
    """
    if config.module is None:
        raise ValueError('`module` is missing from the "guide" config: pass a GuidanceModule or its Hub id.')
    module = given_or_loaded(GuidanceModule.from_pretrained, config.module)
    if not isinstance(module, GuidanceModule):
        raise TypeError(f"`module` has to be a GuidanceModule, got a {type(module).__name__}.")
    text = model.config.get_text_config(decoder=True)
    if text.model_type not in GUIDED:
        raise UnsupportedError(
            f"Guidance was not verified for model type {text.model_type!r}, only for {', '.join(sorted(GUIDED))}."
        )
    if attention_of(text) not in _ATTENTION:
        raise UnsupportedError(
            f"Guidance needs attn_implementation {' or '.join(_ATTENTION)}, got {attention_of(text)!r}."
        )
    if module.config.hidden_size != text.hidden_size:
        raise MismatchError(
            f"`module` was trained on hidden_size={module.config.hidden_size} (backbone {module.config.backbone!r}), "
            f"but the states of this {type(model).__name__} have width {text.hidden_size}; load the matching module."
        )
    if module.config.layer + 1 >= text.num_hidden_layers:
        raise MismatchError(
            f"`module` reads layer {module.config.layer}, above which this model of {text.num_hidden_layers} layers "
            "has none to guide; load the matching module."
        )
    module.require_finite()
    if not config.allow_backbone_mismatch:
        refuse_other_backbone("module", module.config, model)
    own: GuidanceModule = shadow(module)
    own.eval()
    return own


class Guidance(Method):
    """The state of guidance in one `generate` call.

    The engine enters [`around_forward`] around every forward. Inside, the module reads the states behind one layer and
    makes a bridge of them, which the layers above see.

    Args:
        model: the backbone.
        module: a module that fits it.
        config: runtime configuration.

    Attributes:
        state ([`BridgeState`], *optional*): after the last forward; `before` is that of the token before.
    """

    values_texts = True
    last_token_apart = True

    def __init__(self, model: PreTrainedModel, module: GuidanceModule, config: GuidanceConfig):
        self.layers, self.module, self.config = decoder_layers(model), module, config
        self.point = layer_point(model, module.config.layer)
        self.state: BridgeState | None = None
        self.before: BridgeState | None = None
        self.step = -1
        self.read: list[Tensor] = []
        self.prompt = self.prompt_mask = self.questions = torch.empty(0)  # once the prompt was read
        self.lookahead = "expanded"

    @classmethod
    def bind(cls, config: GuidanceConfig, call: Call) -> list[Method]:
        """The guidance that `config` asks for."""
        if ActivationConfig.method in call.asked:
            raise ValueError("Steering vectors and guidance do not go together: pass one of them.")
        filtering = call.asked.get(ValueFilterConfig.method)
        refuse_unguidable(call.input_ids, call.config, call.model_kwargs, getattr(filtering, "lookahead", "auto"))
        return [cls(call.model, load_module(config, call.model), config)]

    def around_forward(self, reading: Reading) -> AbstractContextManager[Any]:
        """Read a prompt (without its last token), or guide the next token, or candidates, each by its own bridge."""
        if reading.prompt is not None:
            self.mask = reading.mask
            return self.point.watched(self._read)
        if reading.begins:
            self.before, self.step = self.state, self.step + 1
        if isinstance(reading.cache, LookaheadCache):
            return self._branching(reading.cache)
        return self._guiding(reading.cache)

    def separate(self, row: int, stops: Stops) -> None:  # noqa: ARG002
        assert self.state is not None  # the prompt's last token was a step
        self.state = self.state.take(torch.tensor([row]))
        self.prompt, self.prompt_mask = self.prompt[row : row + 1], self.prompt_mask[row : row + 1]

    def snapshot(self) -> Mapping[str, Tensor]:
        assert self.state is not None
        return {"step": torch.full((len(self.state.shown),), self.step), **self.state.to_dict()}

    def restore(self, rows: Tensor | slice, state: Mapping[str, Tensor]) -> None:
        assert self.state is not None
        other = BridgeState.from_dict(state)
        self.step = int(state["step"][0])  # it is the same in all rows, whenever they are together
        self.state = other if isinstance(rows, slice) else self.state.put(rows, other)

    def values(self, features: Tensor, rows: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The values that the module has given the last token that it has read."""
        assert self.state is not None  # the prompt's last token was a step
        return self.state.values.to(features.device)

    def record(self, moment: Moment) -> Mapping[str, Tensor]:
        assert self.state is not None
        return {"guided": self.state.shown.to(moment.live.device) & moment.live}

    @contextmanager
    def _guiding(self, cache: Cache) -> Iterator[None]:
        """Guide the forward of the next token of every row."""
        with self._forward(cache, self.before, None) as made:
            yield
        self.state = made[0]

    @contextmanager
    def _branching(self, cache: LookaheadCache) -> Iterator[None]:
        """Guide the forward of candidates, each with a bridge of its own; those that are committed keep it."""
        assert self.before is not None  # the prompt's last token was a step
        batch = len(self.before.shown)
        rows = torch.arange(batch) if cache.rows is None else cache.rows
        owners = rows.repeat_interleave(cache.count).to(self.before.shown.device)
        with self._forward(cache, self.before.take(owners), owners) as made:
            yield
        branches = made[0]

        def commit(rows: Tensor, chosen: Tensor) -> None:
            assert self.state is not None
            self.state = self.state.put(rows, branches.take(chosen))

        cache.on_commit = commit

    @contextmanager
    def _forward(self, cache: Cache, before: BridgeState | None, owners: Tensor | None) -> Iterator[list[BridgeState]]:
        """One forward of one token a row; `owners` are their rows in the batch, all if `None`."""
        made: list[BridgeState] = []
        due = before is None or (self.config.refresh_interval > 0 and self.step % self.config.refresh_interval == 0)
        with ExitStack() as stack:

            def guide(states: Tensor) -> Tensor | None:
                made.append(self._refresh(states, before, owners) if due or before is None else before)
                state = made[0]
                if not bool(state.shown.any()):
                    return None
                if self.module.config.injection == "inject":
                    return states + (state.bridge * state.shown[:, None, None]).to(states)
                above = self.module.config.layer + 1
                stack.enter_context(bridged(self.layers, above, cache, state, due))
                return None

            with self.point.watched(guide):
                yield made
        if not made:
            raise ScoringError("The layer that the guidance module reads was not called: this model cannot be guided.")

    @torch.no_grad()
    def _refresh(self, states: Tensor, before: BridgeState | None, owners: Tensor | None) -> BridgeState:
        """What the module makes of the states of the next token, `(rows, 1, width)`."""
        module, config = self.module, self.config
        if before is None:
            self._end_prompt(states)
        prompt, mask = (
            (self.prompt, self.prompt_mask) if owners is None else (self.prompt[owners], self.prompt_mask[owners])
        )
        logits, corrections = module.correct(module.encode(states, prompt, mask))
        make = module.bridge if module.config.injection == "bridge" else module.injection
        bridge = make(states, corrections, self.questions)[:, 0]
        _require_finite(logits, bridge, self.step)
        if before is not None:
            bridge = torch.lerp(bridge, before.bridge, config.momentum)
        discontent = (corrections != 0).any(dim=-1)[:, 0]
        shown = discontent if config.neutral_when_safe else torch.ones_like(discontent)
        return BridgeState(bridge, shown & (module.generator.gate > 0), logits[:, 0].sigmoid())

    @torch.no_grad()
    def _read(self, states: Tensor) -> None:
        """Take in some states of the prompt; what the module remembers of them is smaller than they are."""
        if self.module.device != states.device:
            # A copy: the weights of the shadow are those of the user's module, which stays where it is.
            self.module = copy.deepcopy(self.module).to(states.device)
        self.read.append(self.module.read_prompt(states))

    def _end_prompt(self, last: Tensor) -> None:
        self._read(last)
        self.prompt, self.questions = torch.cat(self.read, dim=1), self.module.generator.questions()
        self.read.clear()
        everything = torch.ones(self.prompt.shape[:2], dtype=torch.bool, device=last.device)
        self.prompt_mask = everything if self.mask is None else self.mask.to(last.device).bool()


def _require_finite(logits: Tensor, bridge: Tensor, step: int) -> None:
    broken = ~(logits.isfinite().all(dim=-1) & bridge.isfinite().flatten(1).all(dim=-1))
    if bool(broken.any()):
        raise ScoringError(
            f"The guidance module returned what is not finite at new token {step} in row(s) "
            f"{broken.nonzero().flatten().tolist()}. The generation was stopped; the token was not emitted. Check the "
            "module's weights and the backbone's dtype."
        )
