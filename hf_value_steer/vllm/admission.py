"""Requests are checked before they are admitted: a wrong one gets its reason (HTTP 400), and the engine lives on."""

import itertools
from typing import Any, ClassVar

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from hf_value_steer.vllm.refusals import refuse_request
from hf_value_steer.vllm.served import ServedMethods


class Admission(V1Processor, V2Processor):  # type: ignore[misc]
    """A logits processor that processes nothing: vLLM asks its class about the parameters of every request.

    vLLM calls [`validate_params`] with the parameters, and refuses the request if it raises. Every engine has a class
    of its own, made by [`admission_for`], because there may be several engines in a process.

    Attributes:
        served ([`ServedMethods`], *optional*): what the engine serves, in the process in which its arguments were
            made. Without it, overrides are checked in the engine, where a wrong one ends the request with an error.
    """

    served: ClassVar[ServedMethods | None] = None

    def __init__(self, *args: Any):
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise a `ValueError` for what cannot be steered as the request wants it."""
        if _is_of_a_beam(sampling_params):
            raise ValueError("Value steering under vLLM does not support beam search.")
        if cls.served is not None:
            refuse_request(sampling_params, cls.served.choose(sampling_params.extra_args)[0])

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, *_: Any) -> None:
        pass

    def apply(self, logits: Any, *_: Any) -> Any:
        return logits

    def add_request(self, *_: Any) -> bool:
        return False


_made: dict[str, type[Admission]] = {}
_numbers = itertools.count()


def admission_for(served: ServedMethods) -> str:
    """Make the admission of an engine; returns the name, `"module:class"`, by which vLLM finds it."""
    name = f"{Admission.__name__}{next(_numbers)}"
    _made[name] = type(name, (Admission,), {"served": served, "__module__": __name__})
    return f"{__name__}:{name}"


def admission(name: str) -> type[Admission]:
    """The class of a name that [`admission_for`] has made."""
    return _made[name.partition(":")[2]]


def __getattr__(name: str) -> type[Admission]:
    """Classes that were made here, or in the process from which this one was started."""
    if name.removeprefix(Admission.__name__).isdecimal():
        return _made.get(name, Admission)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_of_a_beam(params: SamplingParams) -> bool:
    """Whether vLLM asks for the next tokens of a beam: it reads logprobs and drops the token that was checked."""
    return params.max_tokens == 1 and bool(params.logprobs) and params.watermarking is False and not params.detokenize
