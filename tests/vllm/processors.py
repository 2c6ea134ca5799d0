"""A logits processor of a user, for either model runner."""

from typing import Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from tests.vllm.tiny import EOS


class NoEnd(V1Processor, V2Processor):  # type: ignore[misc]
    """Forbids EOS, to every request."""

    def __init__(self, *_: Any):
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, *_: Any) -> None:
        pass

    def apply(self, logits: Any, *_: Any) -> Any:
        logits[:, EOS] = -float("inf")
        return logits
