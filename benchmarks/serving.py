"""Throughput of steered vLLM against stock vLLM in the same run, on SmolLM2-135M in bfloat16.

`python -m benchmarks.serving --output benchmarks/results/serving-cpu.json`, in the environment of `make test-vllm`.
The engines live side by side in one process and take turns, step by step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm

from benchmarks.environment import command, describe, save
from examples.smollm2 import backbone_folder
from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.vllm import steered_engine_args


NEW_TOKENS, CANDIDATES, NEVER = 96, 8, 1 - 1e-6
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


@dataclass
class Run:
    """One way to serve.

    Args:
        llm: its engine; several runs may share one.
        threshold (`float`, *optional*): of the filter.
    """

    llm: vllm.LLM
    threshold: float | None = None
    seconds: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def start(self, requests: int) -> None:
        extra = None if self.threshold is None else {"filter.threshold": self.threshold}
        options = {"temperature": 0.8, "top_p": 0.95, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        self.seconds, self.reports = 0.0, []
        for index, topic in enumerate(TOPICS[:requests]):
            params = vllm.SamplingParams(seed=index, extra_args=extra, **options)
            self.llm.llm_engine.add_request(str(index), f"Tell me about {topic}.", params)

    def step(self) -> bool:
        """One step of the engine; whether there is another one."""
        start = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        self.seconds += time.perf_counter() - start
        self.reports += [(each.kv_transfer_params or {}).get("value_steer", {}) for each in outputs if each.finished]
        return bool(self.llm.llm_engine.has_unfinished_requests())


def in_turns(runs: Sequence[Run], requests: int) -> None:
    """Serve the same requests by every run, step by step, so that what disturbs one disturbs them all.

    Each round begins with another run, so that none has an advantage by what ran before it.
    """
    for run in runs:
        run.start(requests)
    left = list(runs)
    while left:
        left = [run for run in [*left[1:], left[0]] if run.step()]


def threshold_for(llm: vllm.LLM, share: float) -> float:
    """The threshold that so many of the natural samples do not pass."""
    run = Run(llm, NEVER)
    in_turns([run], len(TOPICS))
    values = torch.tensor([value for report in run.reports for value in report["values"]])
    return float(values.quantile(1 - share).clamp(1e-6, 1 - 1e-6))


def measure(rounds: int) -> list[dict[str, Any]]:
    model = str(backbone_folder())
    with tempfile.TemporaryDirectory() as scratch:
        config = {"method": "filter", "value_head": random_head(Path(scratch), 576), "threshold": NEVER}

        def steered(**changes: Any) -> vllm.LLM:
            return vllm.LLM(**steered_engine_args(model, {**config, **changes}, **ENGINE))

        rejecting = steered()
        runs = {
            "stock": Run(vllm.LLM(model=model, **ENGINE)),
            "lazy, no interventions": Run(steered(), NEVER),
            "lazy, 5 % of the steps rejected": Run(rejecting, threshold_for(rejecting, 0.05)),
            f"always K={CANDIDATES}": Run(steered(evaluation="eager"), NEVER),
        }
    return [row for requests in (1, len(TOPICS)) for row in _compare(runs, requests, rounds)]


def _compare(runs: dict[str, Run], requests: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each run; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        in_turns(list(runs.values()), requests)
        for name, run in runs.items():
            seconds[name] += [run.seconds] if turn else []
    tokens = requests * NEW_TOKENS
    for name, run in runs.items():
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds["stock"], strict=True)]
        row = {
            "requests": requests,
            "run": name,
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "relative_to_stock": statistics.median(ratios),
            "relative_range": [min(ratios), max(ratios)],
            "interventions": sum(len(report.get("interventions", ())) for report in run.reports),
            "candidates": sum(report.get("candidates_evaluated", 0) for report in run.reports),
            "tokens": tokens,
        }
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    facts = {**describe(vllm=vllm.__version__), "command": command()}
    rows = measure(arguments.rounds)
    result = {**facts, "model": "SmolLM2-135M-Instruct, bfloat16", "rows": rows}
    save(result, arguments.output)


if __name__ == "__main__":
    main()
