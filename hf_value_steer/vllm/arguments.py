"""The engine arguments that steer vLLM."""

from typing import Any

from hf_value_steer.configuration.parse import ValueSteer, parse_configs
from hf_value_steer.vllm.memory import cpu_memory


WORKER = "hf_value_steer.vllm.worker.SteeredWorker"
SCHEDULER = "hf_value_steer.vllm.scheduler.SteeredScheduler"
ASYNC_SCHEDULER = "hf_value_steer.vllm.scheduler.AsyncSteeredScheduler"


def steered_engine_args(model: str, value_steer: ValueSteer, **engine_args: Any) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` and `vllm.EngineArgs` for a steered engine.

    Args:
        model (`str`): the backbone, a Hub id or a folder.
        value_steer: a [`ValueFilterConfig`], an [`AbstentionConfig`], their dict form, or a list of both. Heads are
            named by Hub id or folder.
        engine_args: further arguments of vLLM. `async_scheduling` is off unless it is given; it needs the V2 model
            runner. On a CPU `gpu_memory_utilization` fits what is free, unless it is given.

    Raises:
        ValueError: if vLLM cannot honour the configuration, or an argument is one that steering sets.
    """
    from hf_value_steer.vllm.admission import admission_for
    from hf_value_steer.vllm.served import ServedMethods

    configs = [config.to_dict() for config in parse_configs(value_steer).values()]
    served = ServedMethods.load(configs)
    ours = {
        "model": model,
        "worker_cls": WORKER,
        "scheduler_cls": ASYNC_SCHEDULER if engine_args.get("async_scheduling") else SCHEDULER,
        "disable_hybrid_kv_cache_manager": True,  # one group of blocks, also for models with sliding windows
    }
    taken = sorted(set(ours) & set(engine_args))
    if taken:
        raise ValueError(f"{', '.join(f'`{name}`' for name in taken)} cannot be given: value steering sets them.")
    additional = {**engine_args.pop("additional_config", {}), "value_steer": configs}
    processors = [admission_for(served), *(engine_args.pop("logits_processors", None) or ())]
    chosen = {"async_scheduling": False, **cpu_memory(), **engine_args}
    return {**ours, **chosen, "additional_config": additional, "logits_processors": processors}
