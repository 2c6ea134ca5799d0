"""The scheduler of vLLM with room for the look-ahead, which gathers the steering reports."""

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from hf_value_steer.vllm.lookahead import scratch_blocks
from hf_value_steer.vllm.report import RunnerReport, SteeringReport


class SteeredScheduler(Scheduler):  # type: ignore[misc]
    """Keeps one slot allocated beyond what it schedules, and the last blocks of the cache for the look-ahead.

    After each step vLLM calls `update_from_output`: the reports of the model runner go in, and are added up. When a
    request ends, its report goes out in `kv_transfer_params`.
    """

    def __init__(self, *args: Any, kv_cache_config: KVCacheConfig, **kwargs: Any):
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("Value steering needs one group of KV blocks: pass `disable_hybrid_kv_cache_manager`.")
        scratch = scratch_blocks(kv_cache_config.num_blocks)
        super().__init__(*args, kv_cache_config=replace(kv_cache_config, num_blocks=scratch.start), **kwargs)
        self.num_lookahead_tokens: int = max(self.num_lookahead_tokens, 1)  # the slot of the pending token
        self.steering_reports: dict[str, SteeringReport] = {}
        needed = -(-self.max_model_len // self.block_size) + 1
        if scratch.start < needed:
            raise ValueError(
                f"The KV cache holds {kv_cache_config.num_blocks} blocks, {len(scratch)} of which the look-ahead "
                f"takes, but a request of `max_model_len`={self.max_model_len} needs {needed}: lower it, or give the "
                "cache more memory."
            )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        told: RunnerReport = getattr(model_runner_output, "value_steer", RunnerReport())
        for request_id, report in told.reports.items():
            if request_id in self.requests and not _is_dropped(self.requests[request_id]):
                self.steering_reports.setdefault(request_id, SteeringReport()).add(report)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for each in (output for group in outputs.values() for output in group.outputs):
            self._tell_before_a_stop_string(each)
        for request_id, reason in told.failures.items():
            self._end_with_error(request_id, reason, outputs)
        return outputs

    def _tell_before_a_stop_string(self, output: EngineCoreOutput) -> None:
        """Add the report so far to an output. The front end finds stop strings, so any output may be the last one."""
        request = self.requests.get(output.request_id)
        if request is not None and request.sampling_params.stop and output.kv_transfer_params is None:
            output.kv_transfer_params = self._told(self.steering_reports[output.request_id])

    def _end_with_error(self, request_id: str, reason: str, outputs: dict[int, EngineCoreOutputs]) -> None:
        request = self.requests.get(request_id)
        if request is None or request.is_finished():
            return
        report = self.steering_reports.setdefault(request_id, SteeringReport())
        report.error = reason
        self.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
            EngineCoreOutput(
                request_id=request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                kv_transfer_params=self._told(report),
                trace_headers=request.trace_headers,
            )
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, Any]:
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)
        report = self.steering_reports.pop(request.request_id, None)
        return (kv_params if report is None else self._told(report)), ec_params

    @staticmethod
    def _told(report: SteeringReport) -> dict[str, Any]:
        return {"value_steer": report.to_dict()}


class AsyncSteeredScheduler(SteeredScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same for async scheduling: a step is ordered before the tokens of the step before it are known."""


def _is_dropped(request: Request) -> bool:
    """Whether vLLM drops the output of this step, as the request was preempted in the meantime."""
    return bool(request.drop_stale_output and request.num_stale_output_tokens > 0)
