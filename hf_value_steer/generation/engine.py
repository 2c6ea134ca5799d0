"""The forward passes of a steered generation: prefill, the ordinary decode step, and the look-ahead."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.activation.apply import Steering
from hf_value_steer.backbone.parts import output_embedding
from hf_value_steer.backbone.points import feature_point
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.adapters import AdaptersOfRows
from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.compiled import CompiledForwards, compiled_forwards
from hf_value_steer.generation.guidance import Guidance
from hf_value_steer.generation.kernels import Expanded, Kernel, Look, Whole, compilable_kernel
from hf_value_steer.generation.lookahead import LookaheadCache, pick, select_rows
from hf_value_steer.generation.rope import LongestRow
from hf_value_steer.generation.validation import refuse_cache
from hf_value_steer.hosts.transformers import cache_name, cache_of, next_kwargs, prefill


@dataclass
class State:
    """What the last token left behind, for each row.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, vocab)`): float32, raw. `(rows, 0)` of a look-ahead inside a step,
            which computes those of all rows.
        feature (`torch.FloatTensor` of shape `(rows, width)`): what the output embedding consumed.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in the model's output.
    """

    logits: Tensor
    feature: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def overwrite(self, revision: "Revision") -> None:
        """Put the revised rows' state in its place, but for logits that it does not have."""
        rows, other, keep = revision.rows, revision.state, revision.keep
        pairs = [(self.feature, other.feature)]
        if other.logits.shape[1]:
            pairs.append((self.logits, other.logits))
        pairs += zip(self.hidden_states or (), other.hidden_states or (), strict=True)
        for mine, theirs in zip(self.attentions or (), other.attentions or (), strict=True):
            # A static cache's slots that hold nothing have weights, too, in an ordinary step.
            pairs.append((mine, nn.functional.pad(theirs, (0, mine.shape[-1] - theirs.shape[-1]))))
        for mine, theirs in pairs:
            mine[rows[keep].to(mine.device)] = theirs[keep.to(theirs.device)].to(mine.dtype)


@dataclass
class Revision:
    """Some rows go on with another token than the one that a step forwarded.

    Args:
        rows (`torch.LongTensor` of shape `(n,)`): rows that were looked at.
        state ([`State`]): of the chosen candidates, `(n, ...)`.
        keep (`torch.BoolTensor` of shape `(n,)`): which of them go on with it.
    """

    rows: Tensor
    state: State
    keep: Tensor

    def of_features(self, features: Tensor) -> Tensor:
        """Features `(batch, 1, width)` of the tokens that the rows go on with."""
        revised = features.clone()
        revised[self.rows[self.keep].to(features.device), -1] = self.state.feature[self.keep.to(features.device)]
        return revised


# From the features `(batch, width)` of what a step forwarded.
Revise = Callable[[Tensor], Revision | None]


class Engine:
    """One backbone, one live cache, and the mask and positions of the token that is forwarded next.

    Uses the preparation of `GenerationMixin` itself, so that an ordinary step is the step of plain `generate`.

    Args:
        model: a shadow of the backbone, which belongs to this call.
        model_kwargs: the forward's keyword arguments as `generate` keeps them, the cache among them.
        kernel: how candidates are forwarded; with `guidance`, along the batch dimension.
        steering (*optional*): vectors that are applied to `model`; it is told what each forward reads.
        guidance (*optional*): the value module that takes part in every forward.
        compilable (`bool`): whether `kernel` may give way to one that can be compiled, where the step is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        kernel: Kernel,
        steering: Steering | None = None,
        guidance: Guidance | None = None,
        compilable: bool = True,
    ):
        self.model, self.model_kwargs, self.kernel, self.compilable = model, model_kwargs, kernel, compilable
        self.steering, self.guidance = steering, guidance
        self.live = LiveCache(model_kwargs[cache_name(model_kwargs)], model.config)
        self.point = feature_point(model)
        self.longest_row, self.adapters = LongestRow(model), AdaptersOfRows(model)
        self.compiled: CompiledForwards | None = None
        self.sharded = any(isinstance(weight, DTensor) for weight in output_embedding(model).parameters())

    def prefill(self, input_ids: Tensor, config: GenerationConfig) -> State:
        """Forward the prompt; the state is that of its last token."""
        if self.guidance is not None:
            return self._prefill_guided(self.guidance, input_ids, config)
        if self.steering is not None:
            self.steering.read_prompt(self.model_kwargs.get("attention_mask"), input_ids.shape[1])
        outputs, feature = self._forward(lambda: prefill(self.model, input_ids, config, self.model_kwargs))
        self.model_kwargs = next_kwargs(self.model, outputs, self.model_kwargs)
        self._start(config)
        if not config.output_attentions:
            self.compiled = compiled_forwards(self.model, config, self.model_kwargs)
        if self.compiled is not None and self.compilable:
            self.kernel = compilable_kernel(self.kernel, self.model, self.live)
        return self._state(outputs, feature[:, -1], input_ids.device)

    def _prefill_guided(self, guidance: Guidance, input_ids: Tensor, config: GenerationConfig) -> State:
        """The prompt but for its last token goes in as it is; that token is the first step to be guided."""
        before = {name: self.model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
        cut = {name: tensor[:, :-1] for name, tensor in before.items() if tensor is not None}
        with guidance.reading(before["attention_mask"]):
            outputs = prefill(self.model, input_ids[:, :-1], config, self.model_kwargs | cut)
        self.model_kwargs[cache_name(self.model_kwargs)] = cache_of(outputs)
        self._start(config)
        state = self.advance(input_ids)
        self.commit()
        return state

    def _start(self, config: GenerationConfig) -> None:
        """Begin with what the forward of the prompt has left: its cache may be another one than it was given."""
        cache = cache_of(self.model_kwargs)
        refuse_cache(cache, config.max_length)
        if cache is not None and cache is not self.live.cache:
            self.live = LiveCache(cache, self.model.config)
        self.live.start()

    def _require_cache(self, inputs: Mapping[str, Any], cache: Cache) -> None:
        """Raise a `ScoringError` if the model goes on without the `cache` that it was given."""
        if cache_of(inputs) is not cache:
            raise ScoringError(
                f"{type(self.model).__name__} has dropped its cache after {self.live.length} tokens, where it changes "
                "its position embedding: a text cannot be steered across this length. Keep it shorter, or begin with "
                "a longer prompt."
            )

    def _remember(self) -> None:
        self.live.remember()
        if self.guidance is not None:
            self.guidance.begin_step()

    def advance(self, input_ids: Tensor, revise: Revise | None = None) -> State:
        """Forward the last token of each row, as plain `generate` does.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text, the last token included.
            revise (*optional*): may look ahead in some rows and let them go on with another token.
        """
        self._remember()
        if self.steering is not None:
            self.steering.read_generated()
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        self._require_cache(inputs, self.live.cache)
        if revise is not None and self.looks_inside:
            return self._advance_inside(inputs, revise, input_ids.device)
        if self.compiled is not None:
            outputs, feature = self.compiled.step(self.model, inputs)
        else:
            guided = nullcontext() if self.guidance is None else self.guidance.guiding(self.live.cache)
            with guided:
                outputs, feature = self._forward(lambda: self.model(**inputs, return_dict=True))
        self.live.advance()
        state = self._state(outputs, feature[:, -1], input_ids.device)
        revision = None if revise is None else revise(state.feature)
        if revision is not None:
            state.overwrite(revision)
        return state

    def _advance_inside(self, inputs: dict[str, Any], revise: Revise, device: torch.device) -> State:
        """The same, but rows are revised between the layers and the output embedding."""
        revisions: list[Revision | None] = []

        def finish_layers(feature: Tensor) -> Tensor:
            self.live.advance()
            revision = revise(feature[:, -1])
            revisions.append(revision)
            return feature if revision is None else revision.of_features(feature)

        outputs, feature = self._forward(lambda: self.model(**inputs, return_dict=True), finish_layers)
        state = self._state(outputs, feature[:, -1], device)
        if revisions[0] is not None:
            state.overwrite(revisions[0])
        return state

    @property
    def looks_inside(self) -> bool:
        """Whether rows are revised between the layers and the output embedding, which is then computed once.

        It is not where another forward may not run inside one: in a graph, under the hooks of the guidance, and with
        an output embedding that is sharded, whose own hooks gather it.
        """
        return self.compiled is None and self.guidance is None and not self.sharded

    def look_ahead(
        self,
        input_ids: Tensor,
        candidates: Tensor,
        choose: Callable[[Tensor], Tensor],
        rows: Tensor | None = None,
        most: int | None = None,
    ) -> tuple[State, LookaheadCache]:
        """Forward K candidates of some rows at one position, and read the state of the chosen one.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far, of all rows.
            candidates (`torch.LongTensor` of shape `(rows, K)`): token ids.
            choose: from features `(rows, K, width)` to the chosen columns `(rows,)`; may raise.
            rows (`torch.LongTensor`, *optional*): which rows these are, inside [`advance`]: the live cache already
                holds the natural sample, which the candidates do not see.
            most (`int`, *optional*): the most candidates that a look-ahead of this generation has: a compiled one
                always forwards so many, in all rows.
        """
        if rows is None:
            self._remember()
        copies = candidates.shape[1] if isinstance(self.kernel, Expanded) else 1
        read = None if isinstance(self.kernel, Whole) else rows
        if self.steering is not None:
            self.steering.read_generated(read, copies)
        if self.compiled is not None and isinstance(self.kernel, Whole):
            return self._look_ahead_compiled(self.compiled, input_ids, candidates, choose, rows, most)
        chosen: list[Tensor] = []
        features: list[Tensor] = []
        positions = 0 if rows is not None and self.looks_inside else 1

        def keep_chosen(feature: Tensor) -> Tensor:
            feature = feature.reshape(*candidates.shape, -1)
            chosen.append(choose(feature))
            features.append(pick(feature, chosen[-1]))
            self.adapters.go_on_with_one(copies)
            return features[-1][:, :positions]

        look = self._look(input_ids, candidates, rows)
        inputs = self.kernel.inputs(look)
        self._require_cache(inputs, look.cache)
        guided = nullcontext() if self.guidance is None else self.guidance.branching(look.cache)
        everybody = None if rows is None else self.model_kwargs.get("position_ids")
        adapters = self.adapters.reading(read, copies)
        with self.kernel.attention(look), guided, adapters, self.longest_row.reaching(everybody):
            outputs, _ = self._forward(lambda: self.model(**inputs | {"return_dict": True}), keep_chosen)
        self._pick(outputs, chosen[0])
        return self._state(outputs, features[0][:, 0], candidates.device), look.cache

    def _look(self, input_ids: Tensor, candidates: Tensor, rows: Tensor | None) -> Look:
        cache = LookaheadCache(self.live, candidates.shape[1], self.kernel.layer, rows)
        return Look(self.model, self.model_kwargs, cache, input_ids, candidates, rows)

    def _look_ahead_compiled(
        self,
        compiled: CompiledForwards,
        input_ids: Tensor,
        candidates: Tensor,
        choose: Callable[[Tensor], Tensor],
        rows: Tensor | None,
        most: int | None,
    ) -> tuple[State, LookaheadCache]:
        """The same with shapes that never change: all rows, always as many candidates, and logits of all of them."""
        looked_at = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
        padded = candidates.new_zeros(len(input_ids), most or candidates.shape[1])
        padded[looked_at, : candidates.shape[1]] = candidates
        look = self._look(input_ids, padded, rows)
        outputs, features = compiled.look_ahead(self.model, self.kernel.inputs(look))
        look.cache.keep_rows(looked_at)
        features = features[looked_at, : candidates.shape[1]]
        columns = choose(features)
        self._pick(outputs, columns, rows)
        outputs.logits = pick(outputs.logits[looked_at], columns)
        return self._state(outputs, pick(features, columns)[:, 0], candidates.device), look.cache

    def _pick(self, outputs: ModelOutput, columns: Tensor, rows: Tensor | None = None) -> None:
        """Keep the hidden states and attentions of the chosen candidates, of the looked-at `rows` of the forward."""
        for name, pick_one in (("hidden_states", self.kernel.pick_hidden), ("attentions", self.kernel.pick_attention)):
            if outputs.get(name) is not None:
                outputs[name] = tuple(pick_one(select_rows(layer, rows), columns) for layer in outputs[name])

    def commit(self) -> None:
        """The token that was forwarded last stays: move mask, positions and windows on by one."""
        self.live.settle()
        self.model_kwargs = next_kwargs(self.model, ModelOutput(), self.model_kwargs)

    def finish(self) -> None:
        """Instead of the last `commit`: leave the cache as plain `generate` does, without the last token."""
        self.live.remove_last()

    def _forward(
        self, run: Callable[[], ModelOutput], transform: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ModelOutput, Tensor]:
        """One forward, or with chunks of a prompt several; `transform` says what the output embedding consumes."""
        passage = _Passage(transform)
        detach = self.point.attach(passage)
        try:
            outputs = run()
        finally:
            detach()
        if not passage.features:
            raise ScoringError(
                "The output embedding was called where it cannot be watched: if `model.forward` was compiled, compile "
                "it anew, and steer with it before anything else runs."
            )
        return outputs, passage.features[-1]

    def _state(self, outputs: ModelOutput, feature: Tensor, device: torch.device) -> State:
        logits = outputs.logits[:, -1:].flatten(1).to(copy=True, dtype=torch.float32, device=device)
        return State(logits, feature, outputs.get("hidden_states"), outputs.get("attentions"))


class _Passage:
    """What passes the output embedding in one forward, or with chunks of a prompt in several.

    Args:
        transform (*optional*): says what the output embedding consumes instead, in the first one. Others come from
            look-aheads inside it.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor] | None):
        self.transform, self.features = transform, list[Tensor]()

    def __call__(self, feature: Tensor) -> Tensor | None:
        if self.transform is not None:
            return self._transformed(feature)  # type: ignore[no-any-return]
        self.features.append(feature)
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _transformed(self, feature: Tensor) -> Tensor | None:
        """A graph, where a user compiled `model.forward`, ends here."""
        if self.features or self.transform is None:
            return None
        self.features.append(feature)
        self.features[0] = self.transform(feature)
        return self.features[0]
