"""The sampler of vLLM's V1 model runner, which also says what it drew from."""

from typing import Any

from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from hf_value_steer.vllm.permissions import Permissions


class RecordingSampler(Sampler):  # type: ignore[misc]
    """Draws the tokens that [`~vllm.v1.sample.sampler.Sampler`] draws, and keeps the scores that it drew from.

    The V1 model runner calls it as its sampler; after a draw the steered runner asks [`drawn_from`].

    Attributes:
        permissions: of the last draw.
        scores (`torch.FloatTensor` of shape `(rows, vocab)`): scores of the last draw, after every processor,
            temperature, min-p, top-k and top-p.
        logprobs (`torch.FloatTensor` of the same shape, *optional*): the scores that its logprobs were read from, if
            a request asked for them.
    """

    def __init__(self, like: Sampler, permissions: Permissions):
        super().__init__(like.logprobs_mode, like.use_fp64_gumbel)
        self.permissions = permissions
        self.scores: Tensor | None = None
        self.logprobs: Tensor | None = None
        self._gathered_from: Tensor | None = None
        self._draw = self.topk_topp_sampler.forward
        self.topk_topp_sampler.forward = self._filter_and_draw

    def forward(self, *args: Any, **kwargs: Any) -> SamplerOutput:
        self._gathered_from = None
        output = super().forward(*args, **kwargs)
        self.logprobs = self._gathered_from  # those of prompts are gathered after it
        return output

    def sample(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any) -> tuple[Tensor, Tensor | None]:
        self.scores = logits
        self.permissions.read(logits)
        return super().sample(logits, sampling_metadata, *args)  # type: ignore[no-any-return]

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        self._gathered_from = logprobs
        return super().gather_logprobs(logprobs, num_logprobs, token_ids)

    def _filter_and_draw(self, logits: Tensor, generators: Any, k: Tensor | None, p: Tensor | None) -> Any:
        self.scores = apply_top_k_top_p(logits, k, p)
        return self._draw(self.scores, generators, None, None)

    def drawn_from(self, row: int) -> tuple[Tensor, Tensor | None]:
        """The scores that one row of the last draw was drawn from, and those of its logprobs, both `(vocab,)`."""
        assert self.scores is not None  # something was drawn
        return self.scores[row], None if self.logprobs is None else self.logprobs[row]
