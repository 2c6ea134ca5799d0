"""Drawing as `generate` draws, without the sort of the whole vocabulary that top-p costs it.

On a CPU that sort takes longer than the forward pass of a small model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


MOST_LIKELY = 4096  # tokens among which a nucleus is looked for


class NucleusWarper(LogitsProcessor):  # type: ignore[misc]
    """`TopPLogitsWarper`, which sorts only rows whose nucleus is not among the most likely tokens.

    Args:
        top_p (`float`): in (0, 1).
    """

    only_narrows = True  # what is outside of the nucleus is not forbidden: a text may end there

    def __init__(self, top_p: float):
        self.whole = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """From scores to scores, both `(rows, vocab)`; `-inf` outside of the nucleus."""
        top, tokens = scores.topk(min(MOST_LIKELY, scores.shape[-1]))
        probabilities = (top - scores.logsumexp(dim=-1, keepdim=True)).exp()
        inside = probabilities.cumsum(dim=-1) - probabilities < self.whole.top_p
        inside[:, 0] = True
        warped = torch.full_like(scores, -torch.inf).scatter(1, tokens, top.masked_fill(~inside, -torch.inf))
        wide = inside[:, -1]
        if bool(wide.any()):
            warped[wide] = self.whole(input_ids, scores[wide])
        return warped


def generate_arguments(sampling: Mapping[str, Any], *first: LogitsProcessor) -> dict[str, Any]:
    """Arguments of `generate` that draw what it would draw with the arguments `sampling`.

    Args:
        sampling (`dict`): `do_sample`, `temperature`, `top_p` and `top_k`.
        first: processors that see the scores before they are warped.
    """
    if not sampling["do_sample"] or sampling["top_p"] >= 1.0:
        return {**sampling, "logits_processor": [*first]}
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling["temperature"]))]
    if sampling["top_k"]:
        warpers.append(TopKLogitsWarper(sampling["top_k"]))
    warpers.append(NucleusWarper(sampling["top_p"]))
    unwarped = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return {**unwarped, "logits_processor": [*first, *warpers]}
