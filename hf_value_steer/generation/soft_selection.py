"""Soft selection, as pure functions of tensors: candidates that are accepted, or taken, by a draw."""

import torch
from torch import Tensor

from hf_value_steer.choices import Polarity
from hf_value_steer.policy import undesirability


def soft_thresholds(threshold: Tensor, luck: Tensor, beta: float, polarity: Polarity) -> Tensor:
    """Thresholds that make [`~hf_value_steer.policy.acceptable`] a draw, for `selection="soft"`.

    A value passes with probability `min(1, exp(-beta * excess))`. The excess is how far its log odds are beyond those
    of `threshold`, on the side that is not acceptable. What is acceptable passes for certain.

    Args:
        threshold (`torch.FloatTensor` of shape `(rows,)`): in (0, 1).
        luck (`torch.Tensor` of shape `(rows, K)`): uniform numbers in [0, 1), one a candidate.
        beta (`float`): above 0; the larger, the nearer to the hard threshold.
        polarity (`str`): meaning of a high value.

    Returns:
        `torch.DoubleTensor` of shape `(rows, K)`.
    """
    excess = _exact(luck.to(threshold.device)).log() / beta
    sign = 1 if polarity == "desirable" else -1
    return (_exact(threshold).logit()[:, None] + sign * excess).sigmoid()


def reweigh(
    values: Tensor, drawn: Tensor, scores: Tensor, beta: float, polarity: Polarity, luck: Tensor | None
) -> Tensor:
    """Draw a candidate with probability proportional to `exp(score - beta * odds)`.

    Args:
        values (`torch.FloatTensor` of shape `(rows, K)`): of the candidates; the odds are their log odds, on the side
            that is not acceptable.
        drawn (`torch.BoolTensor` of shape `(rows, K)`): which columns hold a candidate.
        scores (`torch.FloatTensor` of shape `(rows, K)`): their log probabilities, up to a number a row.
        beta (`float`), polarity (`str`): as in [`soft_thresholds`].
        luck (`torch.Tensor` of shape `(rows, K)`, *optional*): uniform numbers in [0, 1); without them the most
            probable one is taken.

    Returns:
        `torch.LongTensor` of shape `(rows,)`: columns.
    """
    odds = undesirability(_exact(values), polarity).logit(eps=1e-12)
    least = odds.masked_fill(~drawn, torch.inf).amin(dim=-1, keepdim=True)
    weights = _exact(scores) - beta * (odds - least)  # so that a large `beta` leaves the scores of the best ones
    if luck is not None:
        weights = weights - (-_exact(luck.to(weights.device)).log()).log()  # the largest of these follows the law
    return weights.masked_fill(~drawn | values.isnan(), -torch.inf).argmax(dim=-1)


def _exact(numbers: Tensor) -> Tensor:
    """In float64, where there is: MPS has none."""
    return numbers if numbers.device.type == "mps" else numbers.double()
