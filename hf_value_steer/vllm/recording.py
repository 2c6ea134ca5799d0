"""A worker that steers nothing and keeps the features that a steered one would score, for `collect`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_value_steer.vllm.runner import SteeredRunner
from hf_value_steer.vllm.served import ServedMethods
from hf_value_steer.vllm.worker import SteeredWorker


ROW = "collect.row"  # of a request's `extra_args`: the number of its row in the shard


class RecordingRunner(SteeredRunner):
    """Mixin for a steered model runner (V1 or V2) that keeps the feature of every token of every request.

    Attributes:
        recorded (`dict`): from row and number of new tokens to the feature `(width,)` of the last of them (with none,
            of the prompt's last token), on the CPU. Features that are computed again after a preemption replace the
            first ones.
    """

    recorded: dict[tuple[int, int], Tensor]

    def attach(self, served: ServedMethods) -> None:
        super().attach(served)
        self.recorded = {}

    def on_features(self, rows: Sequence[int], features: Tensor) -> list[int]:
        for row, feature in zip(rows, features[list(rows)].cpu(), strict=True):
            self.recorded[self.params(self.request_id(row)).extra_args[ROW], self.step(row)] = feature
        return super().on_features(rows, features)


class RecordingWorker(SteeredWorker):
    """`worker_cls` of the engine of `collect`, which calls [`take_features`] after each batch of prompts."""

    mixins = (RecordingRunner,)

    def load_served(self) -> ServedMethods:
        return ServedMethods({}, {})

    def attention(self) -> str:
        """Name of the attention kernels."""
        runner: Any = self.model_runner
        return str(runner.attn_groups[0][0].backend.get_name())

    def take_features(self) -> dict[tuple[int, int], Tensor]:
        """What was recorded since the last call, see [`RecordingRunner`]."""
        runner: Any = self.model_runner
        recorded: dict[tuple[int, int], Tensor] = runner.recorded
        runner.recorded = {}
        return recorded
