"""How K candidates go through the backbone in one forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from hf_value_steer.generation.attention import MASKABLE_ATTENTION, candidate_masks
from hf_value_steer.generation.cache import LiveCache, cache_name
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
    if config.model_type in MASKED and config._attn_implementation in MASKABLE_ATTENTION:
        usable["masked"] = Masked()
    usable["expanded"] = Expanded()
    if name == "auto":
        return next(iter(usable.values()))
    if name not in usable:
        raise ValueError(
            f"lookahead={name!r} cannot be used with model type {config.model_type!r}, attn_implementation="
            f'{config._attn_implementation!r} and the arguments of this call; "auto" takes one of {", ".join(usable)}.'
        )
    return usable[name]


def compilable_kernel(kernel: "Kernel", model: PreTrainedModel, live: LiveCache) -> "Kernel":
    """A kernel whose forwards all have one shape, where the model and its cache allow it, else `kernel`."""
    config = model.config.get_text_config(decoder=True)
    maskable = config.model_type in MASKED and config._attn_implementation in MASKABLE_ATTENTION
    static = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in live.cache.layers)
    return Whole() if maskable and static else kernel


class Kernel(Protocol):
    """Candidates `(rows, K)` in, one forward, and how to read what comes out."""

    layer: type[LookaheadLayer]

    def inputs(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        lookahead: LookaheadCache,
        input_ids: Tensor,
        candidates: Tensor,
    ) -> dict[str, Any]:
        """Arguments of the forward.

        Args:
            model: the backbone.
            model_kwargs: as `generate` keeps them for the token after `input_ids`.
            lookahead: the cache of the forward.
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far, of all rows.
            candidates (`torch.LongTensor` of shape `(rows, K)`): token ids.
        """

    def attention(self, model: PreTrainedModel, lookahead: LookaheadCache) -> Any:
        """A context in which the model attends as this kernel needs."""

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        """Hidden state `(rows, 1, width)` of candidate `columns[row]` of every row."""

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        """Attention `(rows, heads, 1, prefix + 1)` of candidate `columns[row]` of every row."""


class Masked:
    """Candidates along the query dimension, all at one position; a 4-D mask keeps them from seeing each other."""

    layer: type[LookaheadLayer] = LookaheadLayer

    def inputs(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        lookahead: LookaheadCache,
        input_ids: Tensor,
        candidates: Tensor,
    ) -> dict[str, Any]:
        rows, shape = lookahead.rows, (candidates.shape[0], candidates.shape[1])
        inputs = dict(model_kwargs, input_ids=candidates)
        inputs[cache_name(model_kwargs)] = lookahead
        inputs.pop("inputs_embeds", None)
        padding_mask = inputs.get("attention_mask")
        if padding_mask is None:
            padding_mask = torch.ones(len(candidates), input_ids.shape[1], device=candidates.device)
        else:
            padding_mask = select_rows(padding_mask[:, :-1], rows)
        inputs["attention_mask"] = candidate_masks(model, lookahead, padding_mask, shape)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = select_rows(inputs["position_ids"][:, -1:], rows).expand(shape).contiguous()
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = candidates.shape[1]
        return inputs

    @contextmanager
    def attention(self, model: PreTrainedModel, lookahead: LookaheadCache) -> Iterator[None]:  # noqa: ARG002
        yield

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        return pick(states, columns)

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        own = pick(weights, columns)
        prefix = weights.shape[-1] - weights.shape[-2]
        index = (prefix + columns.to(own.device))[:, None, None, None].expand(*own.shape[:3], 1)
        return torch.cat([own[..., :prefix], own.gather(-1, index)], dim=-1)


class Whole(Masked):
    """`Masked` over the whole buffers of static layers: every forward has the same shapes and can be compiled."""

    layer = WholeLayer

    def inputs(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        lookahead: LookaheadCache,
        input_ids: Tensor,
        candidates: Tensor,
    ) -> dict[str, Any]:
        rows, lookahead.rows = lookahead.rows, None
        inputs = super().inputs(model, model_kwargs, lookahead, input_ids, candidates)
        lookahead.rows = rows
        return inputs


class Expanded:
    """Candidates along the batch dimension: an ordinary decoding step of `rows * K` rows, whatever the family does."""

    layer: type[LookaheadLayer] = ExpandedLayer

    def inputs(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        lookahead: LookaheadCache,
        input_ids: Tensor,
        candidates: Tensor,
    ) -> dict[str, Any]:
        count = candidates.shape[1]

        def expand(states: Tensor) -> Tensor:
            return select_rows(states, lookahead.rows).repeat_interleave(count, dim=0)

        batch = len(input_ids)
        kwargs = {
            name: expand(value) if isinstance(value, Tensor) and len(value) == batch else value
            for name, value in model_kwargs.items()
        }
        kwargs[cache_name(model_kwargs)] = lookahead
        tokens = torch.cat([expand(input_ids), candidates.reshape(-1, 1)], dim=1)
        return model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **kwargs)  # type: ignore[no-any-return]

    @contextmanager
    def attention(self, model: PreTrainedModel, lookahead: LookaheadCache) -> Iterator[None]:  # noqa: ARG002
        yield

    def pick_hidden(self, states: Tensor, columns: Tensor) -> Tensor:
        return pick_row(states, columns)

    def pick_attention(self, weights: Tensor, columns: Tensor) -> Tensor:
        return pick_row(weights, columns)


class SharedPrefix(Expanded):
    """Candidates along the batch dimension, whose attention reads the prefix of their row once."""

    layer = SharedPrefixLayer

    def inputs(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        lookahead: LookaheadCache,
        input_ids: Tensor,
        candidates: Tensor,
    ) -> dict[str, Any]:
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            lookahead.padding = [0] * len(candidates)
        else:
            lookahead.padding = select_rows((mask == 0).sum(dim=-1), lookahead.rows).tolist()
        return super().inputs(model, model_kwargs, lookahead, input_ids, candidates)

    @contextmanager
    def attention(self, model: PreTrainedModel, lookahead: LookaheadCache) -> Iterator[None]:
        with shared_prefix(model, lookahead):
            yield
