"""Throughput of steered vLLM against stock vLLM in the same run, on SmolLM2-135M in bfloat16.

`python -m benchmarks.serving --output benchmarks/results/serving-cpu.json`, in the environment of `make test-vllm`.
The engines live side by side in one process and take turns. Ratios are of CPU time, with `OMP_NUM_THREADS=1` the time
that an idle machine would take: what else this one does hardly disturbs them, as it does the tokens per second.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm

from benchmarks.environment import describe, save
from examples.smollm2 import backbone_folder
from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.vllm import steered_engine_args


NEW_TOKENS, CANDIDATES = 96, 8
TOPICS = ("the sea", "a small village", "prime numbers", "bread", "the moon", "old maps", "a violin", "winter")
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 512,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def random_head(folder: Path, width: int) -> str:
    """An untrained head of the usual size, whose values spread over (0, 1)."""
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(hidden_size=width))
    with torch.no_grad():
        head.net[-1].weight.mul_(8.0)
    head.save_pretrained(folder)
    return str(folder)


def generate(llm: vllm.LLM, requests: int, threshold: float | None) -> tuple[float, float, list[dict[str, Any]]]:
    """Seconds of CPU time, seconds that went by, and the reports."""
    extra = None if threshold is None else {"filter.threshold": threshold}
    options = {"temperature": 0.8, "top_p": 0.95, "max_tokens": NEW_TOKENS, "ignore_eos": True, "extra_args": extra}
    params = [vllm.SamplingParams(seed=index, **options) for index in range(requests)]
    start, busy = time.perf_counter(), time.process_time()
    outputs = llm.generate([f"Tell me about {topic}." for topic in TOPICS[:requests]], params, use_tqdm=False)
    busy, seconds = time.process_time() - busy, time.perf_counter() - start
    reports = [(output.kv_transfer_params or {}).get("value_steer", {}) for output in outputs]
    return busy, seconds, reports


def threshold_for(llm: vllm.LLM, share: float) -> float:
    """The threshold that so many of the natural samples do not pass."""
    *_, reports = generate(llm, len(TOPICS), 1 - 1e-6)
    values = torch.tensor([value for report in reports for value in report["values"]])
    return float(values.quantile(1 - share).clamp(1e-6, 1 - 1e-6))


def measure(rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        model = str(backbone_folder())
        config = {"method": "filter", "value_head": random_head(Path(scratch), 576), "threshold": 1 - 1e-6}
        stock = vllm.LLM(model=model, **ENGINE)
        lazy = vllm.LLM(**steered_engine_args(model, config, **ENGINE))
        eager = vllm.LLM(**steered_engine_args(model, {**config, "evaluation": "eager"}, **ENGINE))
    rejecting = threshold_for(lazy, 0.05)
    runs: dict[str, tuple[vllm.LLM, float | None]] = {
        "stock": (stock, None),
        "lazy, no interventions": (lazy, 1 - 1e-6),
        "lazy, 5 % of the steps rejected": (lazy, rejecting),
        f"always K={CANDIDATES}": (eager, 1 - 1e-6),
    }
    return [row for requests in (1, len(TOPICS)) for row in _compare(runs, requests, rounds)]


def _compare(runs: dict[str, tuple[vllm.LLM, float | None]], requests: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each run; the first round warms up."""
    busy: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    reports: dict[str, list[dict[str, Any]]] = {}
    for turn in range(rounds + 1):
        for name, (llm, threshold) in runs.items():
            *seconds, reports[name] = generate(llm, requests, threshold)
            if turn > 0:
                busy[name].append(seconds[0])
                wall[name].append(seconds[1])
    tokens = requests * NEW_TOKENS
    for name in runs:
        ratios = [theirs / mine for mine, theirs in zip(busy[name], busy["stock"], strict=True)]
        row = {
            "requests": requests,
            "run": name,
            "tokens_per_second": tokens / min(wall[name]),
            "tokens_per_cpu_second": tokens / statistics.median(busy[name]),
            "relative_to_stock": statistics.median(ratios),
            "relative_range": [min(ratios), max(ratios)],
            "interventions": sum(len(report.get("interventions", ())) for report in reports[name]),
            "candidates": sum(report.get("candidates_evaluated", 0) for report in reports[name]),
            "tokens": tokens,
        }
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    facts = describe()
    facts["versions"]["vllm"] = vllm.__version__
    rows = measure(arguments.rounds)
    command = f"python -m benchmarks.serving {' '.join(sys.argv[1:])}"
    result = {**facts, "command": command, "model": "SmolLM2-135M-Instruct, bfloat16", "rows": rows}
    save(result, arguments.output)


if __name__ == "__main__":
    main()
