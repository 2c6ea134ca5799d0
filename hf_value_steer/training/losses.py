"""Losses of value heads, as pure functions of logits and targets."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_value_steer.choices import Loss


def token_loss(logits: Tensor, targets: Tensor, kind: Loss, positive_weight: float = 1.0) -> Tensor:
    """Loss of each token and attribute, of the shape of `logits`.

    Args:
        logits, targets (`torch.FloatTensor` of shape `(tokens,)` or `(tokens, A)`): targets in [0, 1].
        kind (`str`): `"bce"`, or `"focal"` (arXiv 1708.02002, with soft targets as in 2006.04388: weighted by
            `|target - value|`).
        positive_weight (`float`): weight of the positive part against the negative one.
    """
    weight = torch.tensor(positive_weight, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weight)
    return loss if kind == "bce" else loss * (targets - logits.sigmoid()).abs()


def coherence(logits: Tensor, follows: Tensor) -> Tensor:
    """Mean squared difference of the logits of successive tokens (the TD-coherence term of value-steer 0.2.0), `()`.

    Args:
        logits (`torch.FloatTensor` of shape `(tokens,)` or `(tokens, A)`).
        follows (`torch.BoolTensor` of shape `(tokens,)`): whether a token follows the one before it in its row.
    """
    steps = logits.diff(dim=0)[follows[1:]]
    return steps.square().mean() if len(steps) else logits.new_zeros(())
