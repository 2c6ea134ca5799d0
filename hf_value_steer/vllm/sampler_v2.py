"""The sampler of vLLM's V2 model runner, which also says what it drew from."""

from typing import Any

import numpy as np
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler

from hf_value_steer.vllm.permissions import Permissions


class RecordingSampler(Sampler):  # type: ignore[misc]
    """Draws the tokens that [`~vllm.v1.worker.gpu.sample.sampler.Sampler`] draws, and keeps the scores.

    The V2 model runner calls it as its sampler; after a draw the steered runner asks [`drawn_from`]. A sampler that
    exists is turned into one by [`take_the_place_of`].

    Attributes:
        permissions: of the last draw.
        scores (`torch.FloatTensor` of shape `(rows, vocab)`): scores of the last draw, after every processor,
            temperature, min-p, top-k and top-p.
        logprobs (`torch.FloatTensor` of the same shape, *optional*): the logits that its logprobs are read from, where
            a request asked for them.
    """

    permissions: Permissions
    scores: Tensor
    logprobs: Tensor | None

    @classmethod
    def take_the_place_of(cls, sampler: Sampler, permissions: Permissions) -> None:
        """Turn `sampler` into one of this class."""
        sampler.__class__, sampler.permissions = cls, permissions
        sampler.logits_processors.append(_LastProcessor(permissions))

    def sample(
        self, logits: Tensor, slots: Tensor, mapping: Tensor, numbers: np.ndarray, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.permissions.read(logits)  # vLLM skips all processors, also ours, if no row needs one
        drawn, self.scores = super().sample(logits, slots, mapping, numbers, *args, **kwargs)
        asked = self.get_logprobs_dims(numbers) is not None
        source = self.scores if self.logprobs_mode in PROCESSED_LOGPROBS_MODES else logits
        self.logprobs = source if asked else None
        return drawn, self.scores

    def _sample_random(
        self, scores: Tensor, slots: Tensor, numbers: np.ndarray, places: Tensor, k: Any, p: Any, *flags: bool
    ) -> tuple[Tensor, Tensor]:
        drawn, scores = super()._sample_random(scores, slots, numbers, places, k, p, *flags)
        *_, fused = flags
        return drawn, apply_top_k_top_p(scores, k, p) if fused else scores  # a fused kernel does not filter `scores`

    def drawn_from(self, row: int) -> tuple[Tensor, Tensor | None]:
        """The scores that one row of the last draw was drawn from, and those of its logprobs, both `(vocab,)`."""
        return self.scores[row].float(), None if self.logprobs is None else self.logprobs[row]

    def logprobs_of(self, logits: Tensor, tokens: Tensor, count: int) -> LogprobsTensors:
        """Logprobs of `tokens` `(n,)` and of the `count` most likely ones, from `logits` `(n, vocab)`."""
        as_they_are = self.logprobs_mode in ("raw_logits", "processed_logits")
        return compute_topk_scores(logits, count, tokens, logits_mode=as_they_are)


class _LastProcessor(LogitsProcessor):  # type: ignore[misc]
    """Reads the scores as the last processor: after all that forbids tokens, before top-k and top-p."""

    def __init__(self, permissions: Permissions):
        self.permissions = permissions

    def add_request(self, *_: Any) -> bool:
        return False

    def apply(self, logits: Tensor, _: LogitsContext) -> Tensor:
        self.permissions.read(logits)
        return logits
