"""Cost of steering the real backbone, as ratios inside one run.

    python -m benchmarks.overhead --dtype float32 --output benchmarks/results/overhead-float32.json

Every case is timed in pairs, reference and steered taking turns, and the median of the pairs' ratios is reported. The
prompt is in the cache before the clock starts. The head's values are prescribed (a stand-in head that rejects a set
share of natural samples), so that the intervention rate is what the case says and does not depend on any training.
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.environment import describe, save
from benchmarks.memory import PROMPT, compare_memory
from benchmarks.timing import Case, compare, make_head
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig


CASES = [
    Case("lazy, no interventions, batch 1", new_tokens=128, limit=1.03),
    Case("lazy, no interventions, batch 8", batch=8, new_tokens=128, limit=1.05),
    Case("lazy, no interventions, batch 16", batch=16, new_tokens=128, limit=1.03),
    Case("lazy, 5 % interventions, batch 1", rate=0.05, limit=1.12),
    Case("lazy, 5 % interventions, batch 8", batch=8, rate=0.05, limit=1.45),
    Case("lazy, 5 % interventions, batch 16", batch=16, rate=0.05, limit=1.30),
    Case("eager K=8, batch 1", evaluation="eager", limit=1.60),
    Case("eager K=8 against a repeated cache, 2,048-token prompt", prompt=2048, new_tokens=32, evaluation="eager",
         against="repeated", limit=1 / 3),
    Case("lazy, 5 % interventions, BlockCache, 8,000-token prompt", prompt=8000, new_tokens=40, rate=0.05,
         cache="block", limit=1.0),
]  # fmt: skip


def eager_filter(model: PreTrainedModel) -> ValueFilterConfig:
    return ValueFilterConfig(value_head=make_head(model, 0.2), evaluation="eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, _ = load_backbone(getattr(torch, arguments.dtype))
    results = []
    for case in CASES:
        results.append(compare(model, case, arguments.pairs))
        print(f"{case.name:58s} {results[-1]['ratio_median']:.3f}  (limit {case.limit:.2f})", flush=True)
    memory = compare_memory(arguments.dtype, eager_filter)
    print(f"{f'peak memory, eager K=8, prompt {PROMPT:,}':58s} {memory['ratio']:.3f}  (limit 1.03)")
    report = {
        "command": f"python -m benchmarks.overhead --dtype {arguments.dtype} --pairs {arguments.pairs}",
        **describe(),
        "dtype": arguments.dtype,
        "cases": results,
        "memory": memory,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        save(report, arguments.output)


if __name__ == "__main__":
    main()
