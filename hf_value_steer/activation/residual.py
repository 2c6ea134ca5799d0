"""The residual stream: where a model's decoder layers are, and what stands behind each of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_value_steer.backbone.parts import residual_width, underlying
from hf_value_steer.backbone.points import layer_points


def layer_range(depth: int, start: float = 0.4, stop: float = 0.9) -> tuple[int, ...]:
    """Layers between two fractions of the depth, at least one.

    Args:
        depth (`int`): number of layers.
        start, stop (`float`): fractions, `0 <= start < stop <= 1`; 40-90 % is the range of the article behind this
            method ("Calibrating activation vectors using norm").
    """
    if not 0 <= start < stop <= 1:
        raise ValueError(f"`start` and `stop` have to be fractions with 0 <= start < stop <= 1; got {start}, {stop}.")
    first = min(round(start * depth), depth - 1)
    return tuple(range(first, max(round(stop * depth), first + 1)))


def residual(state: Any, width: int) -> Tensor:
    """What a decoder layer hands on, if it is a residual `(rows, positions, width)`.

    Raises:
        ValueError: if it is not: a model whose stream has another form is not steered.
    """
    if not isinstance(state, Tensor) or state.dim() != 3 or state.shape[-1] != width:
        found = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"A decoder layer should hand on a residual (rows, positions, {width}), it gave {found}.")
    return state


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `(rows, positions)` each. On the right, where padding changes no position and no state."""
    rows = [torch.tensor(row) for row in sequences]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


def read_residuals(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], layers: Sequence[int], batch_size: int = 16
) -> Iterator[tuple[dict[int, Tensor], Tensor, Tensor]]:
    """Forward token ids, and give the residuals of each batch.

    Args:
        sequences: token ids of each text, none empty.
        layers: which to read.
        batch_size (`int`): texts in one forward pass; only one batch is in memory at a time.

    Yields:
        From layer to residual `(rows, positions, width)`, in the model's dtype, differentiable if gradients are
        enabled; the feature `(rows, positions, feature width)`; and the mask `(rows, positions)`: 1 for text, 0 for
        the padding on its right.
    """
    model = underlying(model)
    width, stack = residual_width(model), layer_points(model)
    for first in range(0, len(sequences), batch_size):
        ids, mask = pad_right(sequences[first : first + batch_size], model.device)
        found: dict[int, Tensor] = {}

        def keep(index: int, into: dict[int, Tensor], state: Tensor) -> None:
            into[index] = residual(state, width)
            if torch.is_grad_enabled() and not into[index].requires_grad:  # all weights below are frozen
                into[index].requires_grad_()

        with ExitStack() as points:
            for index in layers:
                points.enter_context(stack[index].watched(partial(keep, index, found)))
            outputs = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        yield found, outputs.last_hidden_state, mask
