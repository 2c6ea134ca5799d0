"""One step of dynamic abstention for the requests of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import advance_streak
from hf_value_steer.vllm.request import Abstaining, SteeredRequest, stack_thresholds


@dataclass
class Text:
    """The text of a request up to its last emitted token.

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
    """Look at texts, once at each, and count what is not acceptable.

    Args:
        texts: of n requests; their state advances.
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
            each.request.record.value = float(value)
    streaks = torch.tensor([each.abstaining.streak for each in texts])
    thresholds = stack_thresholds([each.abstaining.scorer for each in texts])
    advanced = advance_streak(streaks, values, thresholds, head.config.polarity).tolist()
    for each, streak, value in zip(texts, advanced, values.tolist(), strict=True):
        abstaining = each.abstaining
        if each.step >= abstaining.config.min_new_tokens and abstaining.since is None:
            abstaining.streak, abstaining.value = streak, value
