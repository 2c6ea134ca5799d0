"""Requests are checked before they are admitted: a wrong one gets its reason (HTTP 400), and the engine lives on."""

from typing import Any, ClassVar

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from hf_value_steer.vllm.refusals import refuse_request
from hf_value_steer.vllm.steering import Steering


class Admission(V1Processor, V2Processor):  # type: ignore[misc]
    """A logits processor that processes nothing: vLLM asks its class about the parameters of every request.

    Attributes:
        steering ([`Steering`], *optional*): of the engine, where [`steered_engine_args`] made its arguments. Without
            it, overrides are checked in the engine, where a wrong one ends the request with an error.
    """

    steering: ClassVar[Steering | None] = None

    def __init__(self, *args: Any):
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise a `ValueError` for what cannot be steered as the request wants it."""
        if _is_of_a_beam(sampling_params):
            raise ValueError("Value steering under vLLM does not support beam search.")
        if cls.steering is not None:
            refuse_request(sampling_params, cls.steering.choose(sampling_params.extra_args)[0])

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, *_: Any) -> None:
        pass

    def apply(self, logits: Any, *_: Any) -> Any:
        return logits

    def add_request(self, *_: Any) -> bool:
        return False


def _is_of_a_beam(params: SamplingParams) -> bool:
    """Whether vLLM asks for the next tokens of a beam: it reads logprobs and drops the token that was checked."""
    return params.max_tokens == 1 and bool(params.logprobs) and params.watermarking is False and not params.detokenize
