"""Attention masks for K candidates that share a prefix: each sees the prefix and itself, none sees another."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.hosts.transformers import attention_of


MASKABLE_ATTENTION = ("sdpa", "eager")


def tidied(model_kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Arguments of a forward with mask and positions in the one form that look-aheads know.

    `generate` takes masks of any dtype. It also takes masks and positions of one row that are meant for all rows.
    Look-aheads choose rows, and compare neighbours. So masks become 0 where there is padding or a hole, and 1
    elsewhere, and masks and positions get a row for each row of the batch.

    Args:
        model_kwargs: as `generate` keeps them; they are left alone.
        rows (`int`): of the batch.
    """
    tidy = dict(model_kwargs)
    mask, positions = tidy.get("attention_mask"), tidy.get("position_ids")
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise UnsupportedError(f"`attention_mask` has to be of shape (batch, length), got {tuple(mask.shape)}.")
        tidy["attention_mask"] = (mask != 0).long().expand(rows, -1)
    if isinstance(positions, Tensor):
        tidy["position_ids"] = positions.expand(*positions.shape[:-2], rows, -1)
    return tidy


def padding_of(mask: Any, length: int) -> Tensor | None:
    """The padding mask `(batch, length)` behind the mask of a forward, whose last query sees all text but padding.

    Args:
        mask: of two dimensions, or of four with a query dimension, boolean or additive, or a `dict` of such by kind of
            layer: static caches get these.
        length (`int`): of the text.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.dim() == 2:
        return mask  # type: ignore[no-any-return]
    visible = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    visible = visible[:, :length]
    return torch.nn.functional.pad(visible, (length - visible.shape[1], 0), value=True)


def candidate_masks(
    model: PreTrainedModel, lookahead: LookaheadCache, padding_mask: Tensor, shape: tuple[int, int]
) -> Tensor | dict[str, Tensor]:
    """The 4-D mask of a look-ahead forward, or one for each kind of layer where the model has several.

    Args:
        model: the backbone.
        lookahead: the cache of the forward; its layers tell how much of the prefix each kind of layer keeps.
        padding_mask (`torch.Tensor` of shape `(rows, length)`): 0 where the text so far is padding.
        shape (`tuple`): `(rows, K)`.

    Returns:
        `(rows, 1, K, prefix + K)`, boolean for SDPA and additive for eager attention; a `dict` keyed by layer type
        for models whose config has `layer_types` (the form in which `transformers` itself hands masks over).
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return _mask(model, lookahead.layers[0].visible(padding_mask), shape)
    first_layers = {kind: layer_types.index(kind) for kind in set(layer_types)}
    return {
        kind: _mask(model, lookahead.layers[index].visible(padding_mask), shape)
        for kind, index in first_layers.items()
    }


def _mask(model: PreTrainedModel, visible: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, count = shape
    own = torch.eye(count, dtype=torch.bool, device=visible.device).expand(rows, 1, count, count)
    mask = torch.cat([visible[:, None, None].expand(rows, 1, count, visible.shape[1]), own], dim=-1)
    if attention_of(model.config.get_text_config()) == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )
