"""Cost of steering against plain `generate`, as ratios inside one run.

    python -m benchmarks.overhead --dtype float32 --output benchmarks/results/overhead-float32.json

Every case is timed in pairs, plain then steered, and the median of the pairs' ratios is reported. The head's values
are prescribed (a stand-in head that rejects a set share of natural samples), so that the intervention rate is what the
case says and does not depend on any training. The backbone is the real one.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import describe
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, enable_value_steer
from hf_value_steer.modeling import ValueHeadOutput


NEW_TOKENS = 64
CASES = [
    {"name": "lazy, no interventions, batch 1", "batch": 1, "evaluation": "lazy", "rate": 0.0, "limit": 1.05},
    {"name": "lazy, no interventions, batch 8", "batch": 8, "evaluation": "lazy", "rate": 0.0, "limit": 1.05},
    {"name": "lazy, 5 % interventions, batch 1", "batch": 1, "evaluation": "lazy", "rate": 0.05, "limit": 1.20},
    {"name": "lazy, 5 % interventions, batch 8", "batch": 8, "evaluation": "lazy", "rate": 0.05, "limit": 1.45},
    {"name": "eager K=8, batch 1", "batch": 1, "evaluation": "eager", "rate": 0.0, "limit": 1.90},
]


class RejectingHead(ValueHead):
    """A real MLP head whose values are then replaced: natural samples are rejected at `rate`, alternatives never."""

    rate: float = 0.0

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> ValueHeadOutput:
        output = super().forward(hidden_states, labels)
        natural = hidden_states.dim() == 2
        rejected = torch.rand(output.values.shape, generator=self.generator) < (self.rate if natural else 0.0)
        output.values = torch.where(rejected, 0.9, 0.1)
        return output


def make_head(width: int, rate: float) -> RejectingHead:
    head = RejectingHead(ValueHeadConfig(hidden_size=width, threshold=0.5))
    head.rate, head.generator = rate, torch.Generator().manual_seed(0)
    return head


def time_pairs(model: Any, case: dict[str, Any], pairs: int, prompt: int) -> dict[str, Any]:
    torch.manual_seed(0)
    input_ids = torch.randint(1000, 40000, (case["batch"], prompt))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    arguments = {"do_sample": True, "top_k": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    head = make_head(model.config.hidden_size, case["rate"])
    config = ValueFilterConfig(value_head=head, num_candidates=8, evaluation=case["evaluation"])

    def run(**extra: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        output = model.generate(**inputs, **arguments, return_dict_in_generate=True, **extra)
        return time.perf_counter() - start, output

    run(), run(value_steer=config)
    ratios, rates, plain = [], [], []
    for _ in range(pairs):
        (base, _), (steered, output) = run(), run(value_steer=config)
        ratios.append(steered / base)
        plain.append(base)
        rates.append(output.interventions.float().mean().item())
    return {
        **case,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "intervention_rate": round(statistics.mean(rates), 4),
        "plain_tokens_per_second": round(NEW_TOKENS * case["batch"] / statistics.median(plain), 1),
    }


def peak_memory(dtype: str, steer: bool) -> float:
    """Peak resident memory in MiB of a fresh process that generates after a 2,048-token prompt."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--dtype", dtype, "--memory", str(int(steer))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def generate_once(dtype: torch.dtype, steer: bool) -> None:
    model, _ = load_backbone(dtype)
    enable_value_steer(model)
    input_ids = torch.randint(1000, 40000, (1, 2048), generator=torch.Generator().manual_seed(0))
    head = make_head(model.config.hidden_size, 0.2)
    extra = {"value_steer": ValueFilterConfig(value_head=head, evaluation="eager")} if steer else {}
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, max_new_tokens=16, **extra)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.memory is not None:
        generate_once(dtype, bool(arguments.memory))
        return
    model, _ = load_backbone(dtype)
    enable_value_steer(model)
    results = []
    for case in CASES:
        results.append(time_pairs(model, case, arguments.pairs, arguments.prompt))
        print(f"{case['name']:36s} {results[-1]['ratio_median']:.3f}  (limit {case['limit']})", flush=True)
    plain, steered = peak_memory(arguments.dtype, False), peak_memory(arguments.dtype, True)
    memory = {"prompt": 2048, "plain_mib": round(plain), "steered_mib": round(steered)}
    memory["ratio"] = round(steered / plain, 3)
    print(f"{'peak memory, eager K=8, prompt 2,048':36s} {memory['ratio']:.3f}  (limit 1.05)")
    report = {
        "command": f"python -m benchmarks.overhead --dtype {arguments.dtype} --pairs {arguments.pairs}",
        **describe(),
        "dtype": arguments.dtype, "new_tokens": NEW_TOKENS, "prompt": arguments.prompt,
        "cases": results, "memory": memory,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
