"""The decisions of value steering, as pure functions of tensors.

Every engine (the transformers loop, the logits processors, a server adapter) takes its decisions here.
A *value* is a probability in (0, 1), or NaN where the head had no finite answer. A NaN is never acceptable.
"""

from typing import Literal

import torch
from torch import Tensor


Polarity = Literal["undesirable", "desirable"]
Fallback = Literal["argmin", "args", "abstain"]


def acceptable(values: Tensor, threshold: Tensor, polarity: Polarity) -> Tensor:
    """Which values pass the threshold, strictly.

    Args:
        values (`torch.FloatTensor` of any shape): values in (0, 1); NaN is not acceptable.
        threshold (`torch.FloatTensor`, broadcastable to `values`): `c` of arXiv 2605.14746, in (0, 1).
        polarity (`str`): `"undesirable"` accepts `p < c`, `"desirable"` accepts `p > c`.

    Returns:
        `torch.BoolTensor` of the shape of `values`.
    """
    return values < threshold if polarity == "undesirable" else values > threshold


def answered(values: Tensor) -> Tensor:
    """Values as they are, of any shape, but NaN for what is no probability: an infinity, or a number beyond [0, 1]."""
    return values.masked_fill(~((values >= 0) & (values <= 1)), torch.nan)


def undesirability(values: Tensor, polarity: Polarity) -> Tensor:
    """Values turned so that lower is better, in (0, 1); NaN becomes +inf, so that it loses every comparison."""
    turned = values if polarity == "undesirable" else 1.0 - values
    return turned.masked_fill(turned.isnan(), torch.inf)


def select(
    values: Tensor,
    drawn: Tensor,
    threshold: Tensor,
    polarity: Polarity,
    fallback: Fallback = "argmin",
    probabilities: Tensor | None = None,
    prob_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Pick one candidate per row: the first acceptable one, else the fallback (arXiv 2605.14746, ARGS 2402.01694).

    Args:
        values (`torch.FloatTensor` of shape `(rows, K)`): value of each candidate, in draw order.
        drawn (`torch.BoolTensor` of shape `(rows, K)`): which columns hold a candidate; column 0 always does.
        threshold (`torch.FloatTensor` of shape `(rows, 1)`): acceptance threshold.
        polarity (`str`): meaning of a high value.
        fallback (`str`): `"argmin"` takes the most acceptable candidate, `"args"` the one with the lowest
            `u - prob_weight * probability`, where `u` is the undesirability. `"abstain"` answers like `"argmin"`:
            what replaces the candidate is the engine's matter.
        probabilities (`torch.FloatTensor` of shape `(rows, K)`): processed probabilities, needed by `"args"`.
        prob_weight (`float`): weight `w` of the probability in the ARGS score.

    Returns:
        `(choice, found)`, both of shape `(rows,)`: the chosen column, and whether it was acceptable.
    """
    passed = acceptable(values, threshold, polarity) & drawn
    found = passed.any(dim=-1)
    score = undesirability(values, polarity)
    if fallback == "args":
        if probabilities is None:
            raise ValueError('`probabilities` is required by fallback="args".')
        score = score - prob_weight * probabilities
    score = score.masked_fill(~drawn, torch.inf)
    return torch.where(found, passed.int().argmax(dim=-1), score.argmin(dim=-1)), found


def may_insert(scores: Tensor) -> Tensor:
    """Where a method may insert its own tokens: where the call forbids none of them.

    What the call forbids binds a method, too: minimal lengths, suppressed tokens, forced ends.

    Args:
        scores (`torch.FloatTensor` of shape `(rows, tokens)`): of the tokens that would be inserted, under everything
            that forbids tokens and before anything that only narrows the sampling; `-inf` is forbidden.

    Returns:
        `torch.BoolTensor` of shape `(rows,)`.
    """
    return (scores > -torch.inf).all(dim=-1)


def advance_streak(streak: Tensor, values: Tensor, threshold: Tensor, polarity: Polarity) -> Tensor:
    """Count consecutive unacceptable values per row; abstention fires when the count reaches its patience.

    Args:
        streak (`torch.LongTensor` of shape `(rows,)`): the count so far.
        values (`torch.FloatTensor` of shape `(rows,)`): value of the state just reached.
        threshold (`torch.FloatTensor` of shape `(rows,)`): the abstention reward `r` of arXiv 2604.18419.
        polarity (`str`): meaning of a high value.

    Returns:
        `torch.LongTensor` of shape `(rows,)`: the new count, zero where the value was acceptable.
    """
    return torch.where(acceptable(values, threshold, polarity), 0, streak + 1)
