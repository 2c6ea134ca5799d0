"""The decisions of value steering, as pure functions of tensors.

Every engine (the transformers loop, the logits processors, a server adapter) takes its decisions here.
A *value* is a probability in (0, 1), or NaN where the head had no finite answer. A NaN is never acceptable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_value_steer.choices import Fallback, Polarity


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
        threshold (`torch.FloatTensor` of shape `(rows, 1)` or `(rows, K)`): acceptance threshold.
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


def has_begun(step: Tensor | int, min_new_tokens: Tensor | int) -> Tensor | bool:
    """Whether a method acts on tokens after `step` new ones at all: of one number, or of `(rows,)`."""
    return step >= min_new_tokens


def acts(
    interventions: Tensor, step: Tensor | int, min_new_tokens: Tensor | int, most: Tensor | int | None = None
) -> Tensor:
    """Where a method may act on the next token. Numbers are one for all rows, or `(rows,)`.

    Args:
        interventions (`torch.LongTensor` of shape `(rows,)`): how often it has acted in each row.
        step: number of new tokens so far.
        min_new_tokens: it does not act before so many.
        most (*optional*): after so many interventions it leaves a row alone.

    Returns:
        `torch.BoolTensor` of shape `(rows,)`.
    """
    begun = has_begun(step, min_new_tokens)
    if not isinstance(begun, Tensor):
        begun = torch.full_like(interventions, begun, dtype=torch.bool)
    return begun if most is None else begun & (interventions < most)


class Candidates:
    """Candidates of some rows: which are equal, and which have to be forwarded. No synchronisation with a device.

    Args:
        tokens (`torch.LongTensor` of shape `(rows, K)`): token ids in draw order, -1 where there is none.
        known (`torch.BoolTensor` of shape `(rows,)`): rows in which the value of column 0 is known already.
        ending (`int`, *optional*): the token that ends a row; it is forwarded as a further column, K, which is no
            candidate, so that a row that ends has the cache of what it says.
        luck (`torch.Tensor` of shape `(rows, K)`, *optional*): uniform numbers in [0, 1), one a candidate, for judges
            that draw.

    Attributes:
        tokens (`torch.LongTensor` of shape `(rows, columns)`): the ending included, if there is one.
        drawn (`torch.BoolTensor` of shape `(rows, K)`): which columns hold a candidate.
        first (`torch.LongTensor` of shape `(rows, columns)`): the column in which the same token stands first.
        distinct (`torch.BoolTensor` of shape `(rows, columns)`): which columns hold a token for the first time.
        needed (`torch.BoolTensor` of shape `(rows, columns)`): which columns are to be forwarded.
        slots (`torch.LongTensor` of shape `(rows, columns)`): where a needed column stands among the needed ones.
    """

    def __init__(self, tokens: Tensor, known: Tensor, ending: int | None = None, luck: Tensor | None = None):
        self.drawn, self.luck = tokens >= 0, luck
        if ending is not None:
            tokens = torch.nn.functional.pad(tokens, (0, 1), value=ending)
        self.tokens = tokens
        self.first = (tokens[:, :, None] == tokens[:, None, :]).int().argmax(dim=-1)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.distinct = (tokens >= 0) & (self.first == columns)
        self.needed = self.distinct.clone()
        self.needed[:, 0] &= ~known
        self.slots = self.needed.int().cumsum(dim=-1) - 1

    def to_forward(self, width: int) -> Tensor:
        """The needed tokens of each row, in order, `(rows, width)`; any tokens where a row needs fewer."""
        columns = (~self.needed).int().argsort(dim=-1, stable=True)[:, :width]
        return self.tokens.gather(1, columns).clamp(min=0)

    def spread(self, forwarded: Tensor, known: Tensor) -> Tensor:
        """Values of all columns, `(rows, columns)`: equal tokens have equal values, NaN is where there is no token.

        Args:
            forwarded (`torch.FloatTensor` of shape `(rows, width)`): values of [`to_forward`].
            known (`torch.FloatTensor` of shape `(rows,)`): value of column 0, where it was not forwarded.
        """
        if forwarded.shape[1] == 0:
            values = torch.full(self.tokens.shape, torch.nan, device=known.device)
        else:
            values = forwarded.gather(1, self.slots.clamp(0, forwarded.shape[1] - 1))
            values = values.masked_fill(~self.needed, torch.nan)
        values[:, 0] = torch.where(self.needed[:, 0], values[:, 0], known)
        return values.gather(1, self.first).masked_fill(self.tokens < 0, torch.nan)

    def slot(self, column: Tensor) -> Tensor:
        """Where a row's `column` stands in [`to_forward`], `(rows,)`; 0 if it was not forwarded."""
        first = self.first.gather(1, column[:, None])
        return self.slots.gather(1, first).squeeze(1).clamp(min=0)


@dataclass(frozen=True)
class Decision:
    """Which candidate each row commits.

    Args:
        values (`torch.FloatTensor` of shape `(rows, columns)`): value of each candidate, NaN where there is none.
        passed (`torch.BoolTensor` of shape `(rows, K)`): which of them are acceptable.
        column (`torch.LongTensor` of shape `(rows,)`): the committed one.
        found (`torch.BoolTensor` of shape `(rows,)`): whether it is acceptable.
        ends (`torch.BoolTensor` of shape `(rows,)`): whether the row ends instead.
        broken (`torch.BoolTensor` of shape `(rows,)`): whether a candidate has no value, so that nothing may be
            committed.
    """

    values: Tensor
    passed: Tensor
    column: Tensor
    found: Tensor
    ends: Tensor
    broken: Tensor


def decide(
    candidates: Candidates,
    values: Tensor,
    threshold: Tensor,
    polarity: Polarity,
    fallback: Fallback,
    may_end: Tensor,
    probabilities: Tensor | None = None,
    prob_weight: float = 1.0,
) -> Decision:
    """Choose a candidate in each row. Everything that decides about candidates calls this: loop, processors, vLLM.

    Args:
        candidates: of n rows.
        values (`torch.FloatTensor` of shape `(rows, columns)`): from [`Candidates.spread`].
        threshold (`torch.FloatTensor` of shape `(rows,)`, or `(rows, K)`), polarity, fallback, prob_weight: as in
            [`select`].
        may_end (`torch.BoolTensor` of shape `(rows,)`): where `fallback="abstain"` may end a row.
        probabilities (`torch.FloatTensor` of shape `(rows, vocab)`): processed probabilities, needed by `"args"`.
    """
    drawn = candidates.drawn
    own = values[:, : drawn.shape[1]]
    if probabilities is not None:
        probabilities = probabilities.gather(1, candidates.tokens[:, : drawn.shape[1]].clamp(min=0))
    thresholds = threshold[:, None] if threshold.dim() == 1 else threshold
    column, found = select(own, drawn, thresholds, polarity, fallback, probabilities, prob_weight)
    return Decision(
        values,
        acceptable(own, thresholds, polarity) & drawn,
        column,
        found,
        ends=~found & may_end if fallback == "abstain" else torch.zeros_like(found),
        broken=(values.isnan() & (candidates.tokens >= 0)).any(dim=-1),
    )


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


def advance_patience(
    streak: Tensor,
    values: Tensor,
    threshold: Tensor,
    polarity: Polarity,
    acting: Tensor,
    patience: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """[`advance_streak`] where abstention acts, and whether its patience is over.

    Args:
        acting (`torch.BoolTensor` of shape `(rows,)`): see [`acts`]; elsewhere the count stays.
        patience (`int`, or `torch.LongTensor` of shape `(rows,)`): how long it waits.

    Returns:
        `(streak, due)`, both of shape `(rows,)`.
    """
    streak = torch.where(acting, advance_streak(streak, values, threshold, polarity), streak)
    return streak, acting & (streak >= patience)


def next_of_ending(due: Tensor, written: Tensor, permitted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which token of its ending a row gets next. It waits as long as the call forbids what it would begin or go on.

    Args:
        due (`torch.BoolTensor` of shape `(rows,)`): rows that are to end.
        written (`torch.LongTensor` of shape `(rows,)`): tokens of the ending that are there, -1 before it has begun.
        permitted (`torch.FloatTensor` of shape `(rows, tokens)`): scores of the tokens of the ending, as in
            [`may_insert`]. The last one is repeated.

    Returns:
        `(begins, place, forced)`, each of shape `(rows,)`: where the ending begins now, which of its tokens is next,
        and whether it is written now.
    """
    begins = due & (written < 0) & may_insert(permitted)
    place = written.masked_fill(begins, 0).clamp(0, permitted.shape[1] - 1)
    forced = ((written >= 0) | begins) & may_insert(permitted.gather(1, place[:, None]))
    return begins, place, forced
