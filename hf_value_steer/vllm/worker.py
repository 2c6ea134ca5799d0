"""The worker of vLLM whose model runner is steered: `--worker-cls hf_value_steer.vllm.worker.SteeredWorker`."""

from typing import Any

from vllm.platforms import current_platform

from hf_value_steer.vllm.refusals import refuse_engine, refuse_head, refuse_message
from hf_value_steer.vllm.served import ServedMethods


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class SteeredWorker(Worker):  # type: ignore[misc]
    """Builds the runner that stock vLLM would build, and gives it the mixin of its generation as a base.

    vLLM makes it by the name in `worker_cls`, and calls `init_device` and then `compile_or_warm_up_model`.
    """

    mixins: tuple[type, ...] = ()

    def init_device(self) -> None:
        refuse_engine(self.vllm_config)
        self.served = self.load_served()
        super().init_device()
        for head in self.served.heads.values():
            head.to(self.device)

    def load_served(self) -> ServedMethods:
        """The methods to serve; raises a `ValueError` for a head or a message that does not fit the model."""
        served = ServedMethods.load(self.vllm_config.additional_config["value_steer"])
        refuse_head(served, self.vllm_config.model_config)
        refuse_message(served, self.vllm_config.model_config)
        return served

    def compile_or_warm_up_model(self) -> Any:
        """Warm up unsteered, on requests of vLLM's own that no scheduler knows; steer from then on."""
        if self.vllm_config.use_v2_model_runner:
            from hf_value_steer.vllm.runner_v2 import SteeredModelRunner
        else:
            from hf_value_steer.vllm.runner_v1 import SteeredModelRunner
        times = super().compile_or_warm_up_model()
        # The runner holds caches and captured graphs by now: it gets another class, and is not made anew.
        kind = type(self.model_runner)
        self.model_runner.__class__ = type(f"Steered{kind.__name__}", (*self.mixins, SteeredModelRunner, kind), {})
        self.model_runner.attach(self.served)
        return times
