"""Adding vectors to the residual stream of a live model, and taking them off again without a trace."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_value_steer.activation.residual import residual
from hf_value_steer.activation.vectors import Directions
from hf_value_steer.backbone.parts import underlying
from hf_value_steer.backbone.points import Here, layer_points, on_call
from hf_value_steer.checks import as_python
from hf_value_steer.choices import VectorMode
from hf_value_steer.configuration.activate import Tokens, check_choices
from hf_value_steer.errors import ScoringError
from hf_value_steer.hosts.transformers import cache_of, holds_text, stage_of_generate


logger = logging.getLogger(__name__)


class Injection:
    """What is added to a model at the moment.

    Args:
        multiplier (`float` or sequence of `float`): one for all rows, or one for each.
        mode, tokens: as in [`steered`].
        device: where the weights of rows and positions are kept.
        here ([`Here`], *optional*): the block in which the model is steered; `None` where it is steered everywhere,
            because it is the shadow of one call.

    Attributes:
        weight (`torch.FloatTensor` of shape `(rows or 1, positions or 1, 1)`, *optional*): what the vectors are
            multiplied with in the forward that comes next, beside a multiplier for all rows.
        copies (`int`): how many rows the forward has for each row of `weight`.
        gate (`torch.BoolTensor` of shape `(rows,)`, *optional*): the rows that are steered now.
        told (`bool`): whether the caller says what each forward reads, and nothing has to be found out.
        used, elsewhere (`bool`): whether a forward was steered, and whether one of another thread was not.
    """

    def __init__(
        self,
        multiplier: float | Sequence[float],
        mode: VectorMode,
        tokens: Tokens,
        device: torch.device,
        here: Here | None = None,
    ):
        self.mode, self.tokens, self.here, self.copies, self.told = mode, tokens, here, 1, False
        self.used = self.elsewhere = False
        self.number = torch.tensor(id(self))
        _injections[id(self)] = self
        self.gate: Tensor | None = None
        one = isinstance(multiplier, int | float)
        self.common: float = multiplier if one else 1.0  # type: ignore[assignment]
        self.rows = None if one else torch.tensor(multiplier, dtype=torch.float32, device=device)
        self.weight = None if self.rows is None else self.rows[:, None, None]
        self.device = device

    @property
    def positional(self) -> bool:
        """Whether it matters which position a forward reads."""
        return self.mode == "last_token" or self.tokens != "all"

    def read_prompt(self, mask: Tensor | None, length: int) -> None:
        """The forward that comes next reads a prompt.

        Args:
            mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 0 where there is padding.
            length (`int`): positions of the forward.
        """
        self.copies, where = 1, torch.ones(1, 1, 1, device=self.device)
        if self.tokens == "generated":
            where = torch.zeros_like(where)
        elif self.mode == "last_token":
            last = torch.tensor([length - 1]) if mask is None else length - 1 - mask.flip(-1).bool().int().argmax(-1)
            where = nn.functional.one_hot(last.long(), length).to(self.device, torch.float32)[:, :, None]
        self.weight = self._weight(where, None)

    def read_generated(self, rows: Tensor | None = None, copies: int = 1) -> None:
        """The forward that comes next reads generated tokens or candidates, `copies` batch rows for each of `rows`."""
        self.copies = copies
        where = torch.full((1, 1, 1), float(self.tokens != "prompt"), device=self.device)
        self.weight = self._weight(where, rows)

    def _weight(self, where: Tensor, rows: Tensor | None) -> Tensor | None:
        if self.rows is None and self.gate is None and not self.positional:
            return None
        for factor in (self.rows, self.gate):
            if factor is not None:
                chosen = factor if rows is None else factor[rows]
                where = where * chosen[:, None, None]
        return where

    def refuse_unused(self, left_here: bool) -> None:
        """Raise a `ScoringError` if what was meant to be steered may have been run by others, who are not.

        That is so if the model was used by other threads or tasks only: they may have been started in the block. And
        if they used it, and the block was left in another thread or task than it was entered in: a generator's steps.
        """
        if self.elsewhere and not (self.used and left_here):
            raise ScoringError(
                "Inside this `with` block another thread or task used the model, and what that wrote is not steered: "
                "vectors are applied to the thread or task that has entered the block. Run the other's function by "
                "`contextvars.copy_context().run(...)`, or pass `generate(..., value_steer=ActivationConfig(...))`."
            )

    def acts_here(self) -> bool:
        """Whether the thread or task that asks is steered."""
        return self.here is None or self.here()

    def asked_here(self) -> bool:
        """The same, for a forward: notes who has used the model."""
        steered = self.acts_here()
        if steered:  # each thread writes what it knows, and nothing else
            self.used = True
        else:
            self.elsewhere = True
        return steered


# By `id`, for compiled graphs, which hold numbers and no objects.
_injections: WeakValueDictionary[int, Injection] = WeakValueDictionary()


@torch.library.custom_op("hf_value_steer::offset_here", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _offset_here(offset: Tensor, number: Tensor) -> Tensor:
    """`offset` where the injection of that number steers the thread that runs the graph, else zeros."""
    return offset.clone() if _injections[int(number)].asked_here() else torch.zeros_like(offset)


@_offset_here.register_fake
def _(offset: Tensor, _number: Tensor) -> Tensor:
    return torch.empty_like(offset)


class _LayerInjection:
    """What one layer adds to its output: a watcher of its point."""

    def __init__(self, injection: Injection, vector: Tensor):
        self.injection, self.vector, self.width = injection, injection.common * vector, len(vector)
        self.added: Tensor | None = None

    def __call__(self, state: Tensor) -> Tensor | None:
        injection, compiling = self.injection, torch.compiler.is_compiling()
        if compiling and injection.positional and not injection.told:
            raise ScoringError('Compiled models are steered with mode="broadcast" and tokens="all" only.')
        if not compiling and not injection.asked_here():
            return None
        hidden = residual(state, self.width)
        offset = self._offset(hidden)
        if compiling and injection.here is not None:
            offset = _offset_here(offset, injection.number)
        return hidden + offset

    def _offset(self, hidden: Tensor) -> Tensor:
        weight, rows, positions = self.injection.weight, hidden.shape[0], hidden.shape[1]
        if weight is None:
            if self.added is None or self.added.device != hidden.device or self.added.dtype != hidden.dtype:
                self.added = self.vector.to(hidden.device, hidden.dtype)
            return self.added
        fits = weight.shape[0] in (1, rows / self.injection.copies) and weight.shape[1] in (1, positions)
        if not fits:
            raise ValueError(
                f"Steering is set up for {weight.shape[0]} row(s) and {weight.shape[1]} position(s), but the model "
                f"reads {rows} and {positions}: pass one multiplier for each row of the (expanded) batch."
            )
        if self.vector.device != hidden.device:
            self.vector = self.vector.to(hidden.device)
        if weight.shape[0] > 1:
            weight = weight.repeat_interleave(self.injection.copies, dim=0)
        return (weight.to(hidden.device) * self.vector).to(hidden.dtype)


def is_steered(model: PreTrainedModel) -> bool:
    """Whether vectors are applied to `model` now, here."""
    return any(
        isinstance(watcher, _LayerInjection) and watcher.injection.acts_here()
        for point in layer_points(model)
        for watcher in point.watchers
    )


@contextmanager
def steered(
    model: PreTrainedModel,
    vectors: Directions,
    multiplier: float | Sequence[float] = 1.0,
    mode: VectorMode = "broadcast",
    tokens: Tokens = "all",
    allow_backbone_mismatch: bool = False,
) -> Iterator[Injection]:
    """Steer `model` inside a `with` block. Afterwards, also after an exception, it is what it was.

    Works with whatever calls the model in this thread: `generate` in all its modes, pipelines, training loops. Other
    threads get what they would get without it. `torch.compile` and static caches need `mode="broadcast"` and
    `tokens="all"`.

    Args:
        model: the backbone; float or quantised, on one device or several; also inside PEFT or `torch.compile`.
        vectors: of this model.
        multiplier (`float` or sequence of `float`): how much; one for each row of the batch that the model reads
            (after `num_return_sequences` and beams), or one for all. Negative numbers steer the other way.
        mode (`str`): `"broadcast"` adds at every position; `"last_token"` at the last position of a prompt and at the
            tokens generated after it, whose earlier text stays as it was in the cache.
        tokens (`str`): of `"all"`, or only those of the `"prompt"`, or only the `"generated"` ones.
        allow_backbone_mismatch (`bool`): use vectors that were made for another backbone of this shape.

    Raises:
        ValueError: before anything is changed: for vectors that do not fit, and for a model that is steered already.
            In a forward of which it cannot be told whether it reads prompt or generated tokens, where that matters.
        ScoringError: in the end, if only other threads used the model.
    """
    how = (multiplier, mode, tokens, allow_backbone_mismatch)
    with Here() as here, injected(model, vectors, *how, here) as injection:
        yield injection
        left_here = here()
    injection.refuse_unused(left_here)


@contextmanager
def injected(
    model: PreTrainedModel,
    vectors: Directions,
    multiplier: float | Sequence[float],
    mode: VectorMode,
    tokens: Tokens,
    allow_backbone_mismatch: bool = False,
    here: Here | None = None,
) -> Iterator[Injection]:
    """[`steered`] in the context of `here` alone or, if it is `None`, everywhere: for the shadow of one call."""
    model, multiplier = underlying(model), as_python(multiplier)
    check_choices(multiplier, mode, tokens)
    vectors.check_fit(model, allow_backbone_mismatch)
    if vectors.norms is None and vectors.provenance.get("source") in ("pairs", "collection", "value head"):
        _warn_unscaled()
    if is_steered(model):
        raise ValueError("This model is steered by vectors already: leave that `with` block first.")
    injection, points = Injection(multiplier, mode, tokens, model.device, here), layer_points(model)
    with ExitStack() as undo:
        for layer, vector in zip(vectors.layers, vectors.strengths[:, None] * vectors.directions, strict=True):
            undo.callback(points[layer].attach(_LayerInjection(injection, vector), first=True))
        if injection.positional:
            undo.callback(on_call(model, _reader(injection, model)))
        yield injection


@cache  # says it once
def _warn_unscaled() -> None:
    logger.warning(
        "These vectors are not scaled: a small multiplier may be far too much. `vectors.scale(...)`, or "
        "`hf-value-steer vectors scale`, gives them strengths that follow the norms of the model."
    )


def _reader(injection: Injection, model: PreTrainedModel) -> Callable[[nn.Module, dict[str, Any]], None]:
    """What finds out from the arguments of a forward what it reads, unless the decoding engine has said so."""
    use_cache = getattr(model.config.get_text_config(decoder=True), "use_cache", True)

    def read(_model: nn.Module, arguments: dict[str, Any]) -> None:
        if injection.told or torch.compiler.is_compiling():  # in a graph the injections refuse
            return
        if not injection.acts_here():
            return
        ids = arguments.get("input_ids")
        length = (arguments["inputs_embeds"] if ids is None else ids).shape[1]
        cache, stage = cache_of(arguments), stage_of_generate()
        if cache is None and (length == 1 or not arguments.get("use_cache", use_cache)):
            raise ValueError(
                "This forward has no cache, so which of its tokens are prompt and which are generated cannot be told: "
                'generate with `use_cache=True`, or steer with mode="broadcast" and tokens="all".'
            )
        if stage == "chunk":
            raise ValueError('A prompt in chunks is steered with mode="broadcast" and tokens="all" only.')
        if stage == "prompt" or (stage is None and (cache is None or not holds_text(cache))):
            mask = arguments.get("attention_mask")
            mask = mask[:, -length:] if isinstance(mask, Tensor) and mask.dim() == 2 else None
            injection.read_prompt(mask, length)
        elif length == 1:
            injection.read_generated()
        else:
            raise ValueError(
                f"This forward reads {length} tokens after others in a cache: whether they are prompt or generated "
                'cannot be told. Steer it with mode="broadcast" and tokens="all".'
            )

    return read
