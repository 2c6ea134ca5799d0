"""The overhead of this checkout and of another one, in turns: what a change costs.

    git worktree add ../before HEAD~1
    python -m benchmarks.against ../before --rounds 5

Every round times each case in both checkouts, one process after the other, which one first alternating. A case is the
ratio of steered to plain `generate`, as in `benchmarks.overhead`; reported are the medians over rounds, and the median
of the rounds' differences. Both run in the environment of this one. At the end, how long the package takes to import.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, save


HERE = Path(__file__).parents[1]
_TIMED = """
import json, sys, torch
from benchmarks.overhead import CASES
from benchmarks.timing import compare
from examples.smollm2 import load_backbone
wanted, dtype, pairs = json.loads(sys.argv[1])
model, _ = load_backbone(getattr(torch, dtype))
cases = [case for case in CASES if any(case.name.endswith(name) for name in wanted)]
print(json.dumps({case.name: compare(model, case, pairs)["ratio_median"] for case in cases}))
"""
_IMPORT = (
    "import time, transformers, torch; t = time.perf_counter(); import hf_value_steer; print(time.perf_counter() - t)"
)
DEFAULT = ["batch 1", "batch 8"]


def run(checkout: Path, code: str, *arguments: str) -> Any:
    """The last line that `code` prints, run in `checkout`."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(other: Path, rounds: int, code: str, *arguments: str) -> tuple[list[Any], list[Any]]:
    """What `code` says in the other checkout and here, `rounds` times each."""
    found: Mapping[Path, list[Any]] = {other: [], HERE: []}
    for number in range(rounds):
        for checkout in (other, HERE) if number % 2 == 0 else (HERE, other):
            found[checkout].append(run(checkout, code, *arguments))
    return found[other], found[HERE]


def compared(before: list[float], after: list[float]) -> dict[str, Any]:
    return {
        "before": round(statistics.median(before), 4),
        "after": round(statistics.median(after), 4),
        "difference": round(statistics.median(b - a for a, b in zip(before, after, strict=True)), 4),
        "range_before": [min(before), max(before)],
        "range_after": [min(after), max(after)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=DEFAULT, help="ends of names of cases; default: batch 1 and 8")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    other = arguments.other.resolve()
    asked = json.dumps([arguments.cases, arguments.dtype, arguments.pairs])
    before, after = in_turns(other, arguments.rounds, _TIMED, asked)
    rows = {name: compared([each[name] for each in before], [each[name] for each in after]) for name in before[0]}
    rows["seconds to import"] = compared(*in_turns(other, max(arguments.rounds, 5), _IMPORT))
    for name, row in rows.items():
        print(f"{name:40s} {row['before']:.4f} -> {row['after']:.4f}  ({row['difference']:+.4f})", flush=True)
    if arguments.output:
        options = f"--dtype {arguments.dtype} --rounds {arguments.rounds} --pairs {arguments.pairs}"
        command = f"python -m benchmarks.against OTHER {options} --cases {shlex.join(arguments.cases)}"
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True, check=True)
        save({"command": command, "other": commit.stdout.strip(), **describe(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
