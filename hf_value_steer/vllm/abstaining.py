"""One step of dynamic abstention for the requests of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import acts, advance_patience
from hf_value_steer.vllm.request import Abstaining, SteeredRequest, stack_thresholds


@dataclass
class Text:
    """The text of a request up to its last emitted token. The runner makes them in each step, for [`observe`].

    Args:
        request: whose text it is.
        abstaining: its abstention.
        row (`int`): row of the batch.
        step (`int`): number of new tokens; 0 is the prompt.
        place (`int`): where its feature stands among those that were given.
    """

    request: SteeredRequest
    abstaining: Abstaining
    row: int
    step: int
    place: int


def observe(texts: Sequence[Text], values: Tensor, head: ValueHead) -> None:
    """Count unacceptable values, and note which requests are to end. A text counts once, also if it comes again.

    Args:
        texts: of n requests; the state of their abstention is changed.
        values (`torch.FloatTensor` of shape `(n,)`): value of each text, finite.
        head: the head that they come from.
    """
    new = [index for index, each in enumerate(texts) if each.step > each.abstaining.observed]
    if not new:
        return
    texts, values = [texts[index] for index in new], values[new]
    for each, value in zip(texts, values, strict=True):
        each.abstaining.observed = each.step
        if each.step == 0:
            each.request.start_at(each.abstaining.scorer, value)
        elif each.request.filtering is None:
            each.request.report.value = float(value)
    streaks, patience, steps, first, waiting = (
        torch.tensor(numbers)
        for numbers in zip(*((each.abstaining.streak, *_limits(each)) for each in texts), strict=True)
    )
    thresholds = stack_thresholds([each.abstaining.scorer for each in texts])
    acting = waiting & acts(streaks, steps, first)
    advanced = advance_patience(streaks, values, thresholds, head.config.polarity, acting, patience)
    for index in acting.nonzero().flatten().tolist():
        abstaining = texts[index].abstaining
        abstaining.streak, abstaining.due = (int(advanced[0][index]), bool(advanced[1][index]))
        abstaining.value = float(values[index])


def _limits(text: Text) -> tuple[int, int, int, bool]:
    """The patience, the number of new tokens, the first one to count, and whether abstention still waits."""
    abstaining = text.abstaining
    return abstaining.config.patience, text.step, abstaining.config.min_new_tokens, abstaining.since is None
