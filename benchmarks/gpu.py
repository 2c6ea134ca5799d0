"""Cost of steering at the size of real models, on a CUDA device: random weights, bfloat16, static and growing caches.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json

Ratios are against plain `generate` with the same cache in the same run: compiled with a static cache, as `generate`
compiles it. The clock starts after the prompt and a few steps of warm-up. *Of the bandwidth limit* is the time that it
takes to read weights and cache once, at the measured bandwidth of a copy, over the time of a step.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from benchmarks.environment import describe, save
from benchmarks.shapes import MODELS
from benchmarks.timing import make_head
from hf_value_steer import BlockCache, ValueFilterConfig, value_steer_generate
from hf_value_steer.hosts.transformers import CACHE


STEERING: dict[str, dict[str, Any]] = {
    "lazy, 0 %": {"evaluation": "lazy", "rate": 0.0},
    "lazy, 5 %": {"evaluation": "lazy", "rate": 0.05},
    "lazy, 20 %": {"evaluation": "lazy", "rate": 0.2},
    **{f"eager K={count}": {"evaluation": "eager", "rate": 0.0, "count": count} for count in (2, 4, 8, 16)},
}
WARM_UP = 8


class Clock(StoppingCriteria):
    """Notes the time after every token, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self) -> float:
        """Mean seconds a step after the warm-up."""
        times = self.times[WARM_UP:]
        return (times[-1] - times[0]) / (len(times) - 1)


def step_seconds(model: PreTrainedModel, inputs: dict[str, Any], cache: str, new_tokens: int, **extra: Any) -> float:
    clock = Clock()
    choice = {CACHE: BlockCache(model.config)} if cache == "block" else {"cache_implementation": cache}
    model.generate(
        **inputs, **choice, **extra, do_sample=True, top_k=0, max_new_tokens=new_tokens, eos_token_id=None,
        stopping_criteria=[clock],
    )  # fmt: skip
    return clock.step()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**22, dtype=torch.float32, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / min(times)


def bytes_a_step(model: PreTrainedModel, batch: int, length: int) -> int:
    """Weights (without the input embedding, of which a row is read) and cache, once."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * batch * length
    embedding = model.get_input_embeddings().weight.numel()
    return (sum(parameter.numel() for parameter in model.parameters()) - embedding + cache) * model.dtype.itemsize


def measure(
    model: PreTrainedModel, batch: int, prompt: int, cache: str, new_tokens: int, pairs: int
) -> dict[str, Any]:
    """Plain step time and the ratios of every way to steer."""
    input_ids = torch.randint(model.config.vocab_size // 2, (batch, prompt), device=model.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    bandwidth, needed = copy_bandwidth(model.device), bytes_a_step(model, batch, prompt)
    step_seconds(model, inputs, cache, new_tokens)
    plain: list[float] = []
    ratios: dict[str, list[float]] = {}
    steps: dict[str, float] = {}
    for name, options in STEERING.items():
        head = make_head(model, options["rate"])
        count = options.get("count", 8)
        config = ValueFilterConfig(value_head=head, evaluation=options["evaluation"], num_candidates=count)
        steer = {"custom_generate": value_steer_generate, "value_steer": config}
        step_seconds(model, inputs, cache, WARM_UP + 4, **steer)
        for _ in range(pairs):
            plain.append(step_seconds(model, inputs, cache, new_tokens))
            steered = step_seconds(model, inputs, cache, new_tokens, **steer)
            ratios.setdefault(name, []).append(steered / plain[-1])
            steps[name] = steered
    return {
        "batch": batch, "prompt": prompt, "cache": cache,
        "plain_ms": round(1e3 * statistics.median(plain), 3),
        "ratios": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "of_bandwidth_limit": {
            name: round(needed / bandwidth / seconds, 3)
            for name, seconds in {"plain": statistics.median(plain), **steps}.items()
        },
    }  # fmt: skip


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'model':13s} {'cache':8s} {'batch':>5s} {'prompt':>6s} {'plain ms':>9s}  " + "  ".join(STEERING)]
    for name, rows in results.items():
        for row in rows:
            ratios = "  ".join(f"{row['ratios'][steer]:{len(steer)}.3f}" for steer in STEERING)
            share = row["of_bandwidth_limit"]
            lines.append(
                f"{name:13s} {row['cache']:8s} {row['batch']:5d} {row['prompt']:6d} {row['plain_ms']:9.3f}  {ratios}"
                f"   bandwidth: plain {share['plain']:.2f}, lazy {share['lazy, 0 %']:.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["Mistral-7B", "Llama-3.1-8B"], choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--prompts", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--caches", nargs="*", default=["static", "block"], choices=["dynamic", "static", "block"])
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.models:
        with device:
            model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).eval()
        for cache in arguments.caches:
            for batch in arguments.batches:
                for prompt in arguments.prompts:
                    row = measure(model, batch, prompt, cache, arguments.new_tokens, arguments.pairs)
                    results.setdefault(name, []).append(row)
                    print(name, json.dumps(row), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    report = {"command": "python -m benchmarks.gpu", **describe(), "results": results}
    if arguments.output:
        save(report, arguments.output)
    print(table(results))


if __name__ == "__main__":
    main()
