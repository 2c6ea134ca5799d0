"""Cost of steering the real backbone, as ratios inside one run.

    python -m benchmarks.overhead --dtype float32 --output benchmarks/results/overhead-float32.json

Every case is timed in pairs, reference and steered taking turns, and the median of the pairs' ratios is reported. The
prompt is in the cache before the clock starts. The head's values are prescribed (a stand-in head that rejects a set
share of natural samples), so that the intervention rate is what the case says and does not depend on any training.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import describe, save
from benchmarks.timing import Case, compare, make_head
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig, enable_value_steer


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
MEMORY_PROMPT = 8000


def peak_memory(dtype: str, steer: bool) -> float:
    """Peak resident memory in MiB of a fresh process that generates after a long prompt."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--dtype", dtype, "--memory", str(int(steer))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def generate_once(dtype: torch.dtype, steer: bool) -> None:
    model, _ = load_backbone(dtype)
    enable_value_steer(model)
    input_ids = torch.randint(1000, 40000, (1, MEMORY_PROMPT), generator=torch.Generator().manual_seed(0))
    extra = {"value_steer": ValueFilterConfig(value_head=make_head(model, 0.2), evaluation="eager")} if steer else {}
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, max_new_tokens=16, **extra)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.memory is not None:
        generate_once(dtype, bool(arguments.memory))
        return
    model, _ = load_backbone(dtype)
    results = []
    for case in CASES:
        results.append(compare(model, case, arguments.pairs))
        print(f"{case.name:58s} {results[-1]['ratio_median']:.3f}  (limit {case.limit:.2f})", flush=True)
    plain, steered = peak_memory(arguments.dtype, False), peak_memory(arguments.dtype, True)
    memory = {"prompt": MEMORY_PROMPT, "plain_mib": round(plain), "steered_mib": round(steered)}
    memory["ratio"] = round(steered / plain, 3)
    print(f"{f'peak memory, eager K=8, prompt {MEMORY_PROMPT:,}':58s} {memory['ratio']:.3f}  (limit 1.03)")
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
