"""How K candidates go through the backbone in one forward."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.attention import MASKABLE_ATTENTION, candidate_masks
from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.families import MASKED, SHARED_PREFIX
from hf_value_steer.generation.lookahead import (
    ExpandedLayer,
    LookaheadCache,
    LookaheadLayer,
    WholeLayer,
    pick,
    pick_row,
    select_rows,
)
from hf_value_steer.generation.shared_prefix import SharedPrefixLayer, shared_prefix
from hf_value_steer.hosts.transformers import DummyLayer, attention_of, cache_name


# Arguments of a forward that have an entry for each row, and those that have one for each token of it.
BY_TOKEN = frozenset({"position_ids", "token_type_ids", "mm_token_type_ids"})
BY_ROW = BY_TOKEN | {"input_ids", "attention_mask", "inputs_embeds"}
KERNELS = ("shared_prefix", "masked", "expanded")  # fastest first


def choose_kernel(
    name: str, model: PreTrainedModel, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> "Kernel":
    """The kernel of that name, or with `"auto"` the fastest that was verified for this model and fits this call.

    Args:
        name (`str`): `"auto"`, `"shared_prefix"`, `"masked"` or `"expanded"`.
        model: the backbone.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): mask of the prompt.
        output_attentions (`bool`): whether the call returns attention weights.

    Raises:
        ValueError: if the kernel of that name cannot be used here.
    """
    config = model.config.get_text_config(decoder=True)
    usable: dict[str, Kernel] = {}
    padded_left = attention_mask is None or not bool((attention_mask.diff(dim=-1) < 0).any())
    if config.model_type in SHARED_PREFIX and padded_left and not output_attentions:
        usable["shared_prefix"] = SharedPrefix()
    if _maskable(model):
        usable["masked"] = Masked()
    usable["expanded"] = Expanded()
    if name == "auto":
        return next(iter(usable.values()))
    if name not in usable:
        raise UnsupportedError(
            f"lookahead={name!r} cannot be used with model type {config.model_type!r}, attn_implementation="
            f'{attention_of(config)!r} and the arguments of this call; "auto" takes one of {", ".join(usable)}.'
        )
    return usable[name]


def compilable_kernel(kernel: "Kernel", model: PreTrainedModel, live: LiveCache) -> "Kernel":
    """A kernel whose forwards all have one shape, where the model and its cache allow it, else `kernel`."""
    holding = [layer for layer in live.cache.layers if DummyLayer is None or not isinstance(layer, DummyLayer)]
    static = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in holding)
    return Whole() if static and _maskable(model) else kernel


def _maskable(model: PreTrainedModel) -> bool:
    """Whether candidates may stand along the query dimension: the model has to take their position from us."""
    config = model.config.get_text_config(decoder=True)
    told = model.config is config or "position_ids" in inspect.signature(type(model).forward).parameters
    return config.model_type in MASKED and attention_of(config) in MASKABLE_ATTENTION and told


@dataclass(frozen=True)
class LookAhead:
    """What one look-ahead is about; the engine makes one, and a kernel makes the arguments of a forward out of it.

    Args:
        model: the backbone.
        model_kwargs: as `generate` keeps them for the token after `input_ids`.
        cache: the cache of the forward.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far, of all rows.
        candidates (`torch.LongTensor` of shape `(rows, K)`): token ids.
        rows (`torch.LongTensor`, *optional*): which rows of the batch these are, all if `None`.
        padding: asks for the number of padded positions to the left of each text of the batch.
    """

    model: PreTrainedModel
    model_kwargs: dict[str, Any]
    cache: LookaheadCache
    input_ids: Tensor
    candidates: Tensor
    rows: Tensor | None
    padding: Callable[[], list[int]]

    def step(self, text: Tensor, model_kwargs: dict[str, Any], tokens: Tensor | None = None) -> dict[str, Any]:
        """Arguments of an ordinary step with our cache after `text` `(batch, length)`, as the model prepares them.

        Args:
            tokens (`torch.LongTensor` of shape `(batch, 1)`, *optional*): what the step reads; any token if left out.
        """
        ids = torch.cat([text, text.new_zeros(len(text), 1) if tokens is None else tokens], dim=1)
        kwargs = {**model_kwargs, cache_name(model_kwargs): self.cache}
        return self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)  # type: ignore[no-any-return]


def rows_of(name: str, value: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of an argument of a forward. Positions may have several kinds, `(kinds, batch, length)`."""
    if rows is None or _dimension(name) == 0:
        return select_rows(value, rows)
    return value.index_select(_dimension(name), rows.to(value.device))


def begin_of_rows(model_kwargs: Mapping[str, Any], rows: Tensor, length: int) -> dict[str, Any]:
    """Arguments of a forward for the first `length` tokens of some rows."""
    return {
        name: rows_of(name, value, rows)[..., :length] if name in BY_ROW and value is not None else value
        for name, value in model_kwargs.items()
    }


class Padding:
    """Number of padded positions to the left of each text of a batch, for which the host waits once."""

    known: list[int] | None = None

    def __call__(self, mask: Tensor | None, rows: int) -> list[int]:
        if self.known is None:
            self.known = [0] * rows if mask is None else (mask == 0).sum(dim=-1).tolist()
        return self.known


def without_last(model_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mask and positions of a prompt without its last token."""
    given = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
    return {name: tensor[:, :-1] for name, tensor in given.items() if tensor is not None}


def _dimension(name: str) -> int:
    return -2 if name == "position_ids" else 0


class Kernel(Protocol):
    """How a look-ahead becomes one forward, and how to read what comes out.

    The engine calls [`inputs`], and runs the forward inside [`attention`]. [`Alternatives`] calls the other two, which
    find one candidate of each row in what the model returns.
    """

    layer: type[LookaheadLayer]

    def inputs(self, look: LookAhead) -> dict[str, Any]:
        """Arguments of the forward."""

    def attention(self, look: LookAhead) -> AbstractContextManager[None]:
        """A context in which the model attends as this kernel needs."""

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        """Hidden state `(rows, 1, width)` of candidate `columns[row]` of every row."""

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        """Attention `(rows, heads, 1, prefix + 1)` of candidate `columns[row]` of every row."""


class Masked:
    """Candidates along the query dimension, all at one position; a 4-D mask keeps them from seeing each other."""

    layer: type[LookaheadLayer] = LookaheadLayer

    def inputs(self, look: LookAhead) -> dict[str, Any]:
        shape = (look.candidates.shape[0], look.candidates.shape[1])
        mask = look.model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape[0], look.cache.length, device=look.candidates.device)
        else:
            mask = select_rows(mask[:, :-1], look.rows)  # the last column is that of the candidates
        inputs = look.step(look.input_ids, look.model_kwargs)
        for name in (name for name in BY_TOKEN if inputs.get(name) is not None):
            last = rows_of(name, inputs[name][..., -1:], look.rows)
            inputs[name] = last.expand(*last.shape[:-2], *shape).contiguous()
        inputs |= {
            "input_ids": look.candidates,
            "attention_mask": candidate_masks(look.model, look.cache, mask, shape),
        }
        if "logits_to_keep" in inputs:  # `generate` keeps those of one position
            inputs["logits_to_keep"] = shape[1]
        return inputs

    def attention(self, _look: LookAhead) -> AbstractContextManager[None]:
        return nullcontext()

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        return pick(states, columns)

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        own = pick(weights, columns)
        prefix = weights.shape[-1] - weights.shape[-2]
        index = (prefix + columns.to(own.device))[:, None, None, None].expand(*own.shape[:3], 1)
        return torch.cat([own[..., :prefix], own.gather(-1, index)], dim=-1)


class Whole(Masked):
    """`Masked` in all rows, over the whole buffers of static layers: one shape, as compiling needs it."""

    layer = WholeLayer

    def inputs(self, look: LookAhead) -> dict[str, Any]:
        return super().inputs(replace(look, rows=None))


class Expanded:
    """Candidates along the batch dimension: an ordinary decoding step of `rows * K` rows, as every family can."""

    layer: type[LookaheadLayer] = ExpandedLayer

    def inputs(self, look: LookAhead) -> dict[str, Any]:
        def expand(name: str, value: Any) -> Any:
            if name not in BY_ROW or value is None:
                return value
            return rows_of(name, value, look.rows).repeat_interleave(look.candidates.shape[1], dim=_dimension(name))

        kwargs = {name: expand(name, value) for name, value in look.model_kwargs.items()}
        return look.step(expand("input_ids", look.input_ids), kwargs, look.candidates.reshape(-1, 1))

    def attention(self, _look: LookAhead) -> AbstractContextManager[None]:
        return nullcontext()

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        return pick_row(states, columns)

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        return pick_row(weights, columns)


class SharedPrefix(Expanded):
    """Candidates along the batch dimension, whose attention reads the prefix of their row once."""

    layer = SharedPrefixLayer

    def inputs(self, look: LookAhead) -> dict[str, Any]:
        padding = look.padding()
        numbers = look.cache.row_numbers = list(range(len(padding)) if look.rows is None else look.rows.tolist())
        look.cache.padding = [padding[row] for row in numbers]
        return super().inputs(look)

    def attention(self, look: LookAhead) -> AbstractContextManager[None]:
        return shared_prefix(look.model, look.cache)
