"""What a head remembers of the tokens before: a mean, or an exponential mean, of its projection.

The memory of a text is one tensor `(..., 1 + width)`: how many tokens it holds, and their mean. For a head that is not
over time the width is 0, so that whoever carries it does not ask which kind of head it is.
"""

import torch
from torch import Tensor

from hf_value_steer.choices import Temporal


def empty_memory(rows: int, width: int, device: torch.device) -> Tensor:
    """The memory of `rows` texts of which no token was seen, `(rows, 1 + width)`."""
    return torch.zeros(rows, 1 + width, device=device)


def over_time(projected: Tensor, memory: Tensor, temporal: Temporal, decay: float | None) -> tuple[Tensor, Tensor]:
    """The mean at each token, `(..., tokens, width)`, and the memory after the last one, `(..., 1 + width)`.

    Args:
        projected (`torch.FloatTensor` of shape `(..., tokens, width)`): of tokens that follow one another.
        memory (`torch.FloatTensor` of shape `(..., 1 + width)`): of what stands before them.
        temporal (`str`): `"mean"` or `"ema"`.
        decay (`float`, *optional*): of `"ema"`.
    """
    tokens = projected.shape[-2]
    count, mean = memory[..., None, :1], memory[..., None, 1:]
    if tokens == 1:  # a step of decoding
        weight = 1 / (count + 1) if temporal == "mean" else torch.where(count > 0, 1 - _decay(decay), 1.0)
        means = mean + (projected - mean) * weight
    elif temporal == "mean":
        places = torch.arange(1, tokens + 1, device=projected.device)[:, None]
        means = (mean * count + projected.cumsum(dim=-2)) / (count + places)
    else:
        means = _exponential(projected, count, mean, _decay(decay))
    return means, torch.cat([count[..., 0, :] + tokens, means[..., -1, :]], dim=-1)


def _exponential(projected: Tensor, count: Tensor, mean: Tensor, decay: float) -> Tensor:
    """The first token of a text counts as all that was before it."""
    places = torch.arange(projected.shape[-2], device=projected.device)
    ago = places[:, None] - places
    weights = (1 - decay) * (decay ** ago.clamp(min=0)).tril()
    before = torch.where(count > 0, mean, projected[..., :1, :])
    return weights @ projected + decay ** (places[:, None] + 1) * before


def _decay(decay: float | None) -> float:
    assert decay is not None  # the config has set it
    return decay
