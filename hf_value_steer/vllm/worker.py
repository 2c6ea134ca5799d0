"""The worker of vLLM whose model runner is steered: `--worker-cls hf_value_steer.vllm.worker.SteeredWorker`."""

from vllm.platforms import current_platform

from hf_value_steer.vllm.refusals import refuse_engine, refuse_head
from hf_value_steer.vllm.runner import SteeredModelRunner
from hf_value_steer.vllm.steering import Steering


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class SteeredWorker(Worker):  # type: ignore[misc]
    """Builds the runner that stock vLLM would build, and gives it [`SteeredModelRunner`] as a base."""

    def init_device(self) -> None:
        refuse_engine(self.vllm_config)
        steering = Steering.load(self.vllm_config.additional_config["value_steer"])
        refuse_head(steering, self.vllm_config.model_config)
        super().init_device()
        runner = self.model_runner
        for head in steering.heads.values():
            head.to(self.device)
        kind = type(runner)
        runner.__class__ = type(f"Steered{kind.__name__}", (SteeredModelRunner, kind), {})
        runner.attach(steering)
