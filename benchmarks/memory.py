"""Peak memory of a generation after a long prompt, plain and steered, each in a process of its own."""

import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from transformers import PreTrainedModel

from examples.smollm2 import load_backbone
from hf_value_steer import enable_value_steer
from hf_value_steer.configuration.methods import MethodConfig


PROMPT = 8000
Steer = Callable[[PreTrainedModel], MethodConfig]


def compare_memory(dtype: str, steer: Steer) -> dict[str, Any]:
    """Peak resident memory in MiB, and its ratio; `steer` is a function of a module, called in the fresh process."""
    plain, steered = (_peak_of_a_process(dtype, each) for each in (None, steer))
    sizes = {"plain_mib": round(plain), "steered_mib": round(steered)}
    return {"prompt": PROMPT, **sizes, "ratio": round(steered / plain, 3)}


def _peak_of_a_process(dtype: str, steer: Steer | None) -> float:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, dtype, steer).result()


def _peak(dtype: str, steer: Steer | None) -> float:
    model, _ = load_backbone(getattr(torch, dtype))
    enable_value_steer(model)
    input_ids = torch.randint(1000, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    extra = {} if steer is None else {"value_steer": steer(model)}
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, max_new_tokens=16, **extra)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
