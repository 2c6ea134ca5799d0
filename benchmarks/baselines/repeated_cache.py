"""Value-filtered decoding as one writes it by hand: repeat the cache K times, forward K rows, keep one of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_value_steer.hosts.transformers import CACHE


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    head: Any,
    input_ids: Tensor,
    cache: Cache,
    new_tokens: int,
    count: int,
    hand_over: Callable[[], Any],
) -> Tensor:
    """Sample `new_tokens` tokens after `input_ids` `(1, length)`, all but the last of which `cache` holds.

    Takes the first of `count` candidates whose value lies below the head's threshold, else the one with the lowest.
    Calls `hand_over` after every token.
    """
    logits = model(input_ids[:, -1:], **{CACHE: cache}).logits[:, -1]
    for _ in range(new_tokens):
        candidates = torch.multinomial(logits.float().softmax(-1), count, replacement=True)[0]
        cache.batch_repeat_interleave(count)
        output = model(candidates[:, None], output_hidden_states=True, **{CACHE: cache})
        values = head(output.hidden_states[-1][:, -1]).value
        acceptable = values < head.config.threshold
        chosen = torch.where(acceptable.any(), acceptable.int().argmax(), values.argmin()).view(1)
        cache.batch_select_indices(chosen)
        logits = output.logits[chosen, -1]
        input_ids = torch.cat([input_ids, candidates[chosen][None]], dim=1)
        hand_over()
    return input_ids
