"""How long `hf-value-steer COMMAND --help` and a wrong argument take while both cores are busy.

    python -m benchmarks.command_line --output benchmarks/results/command-line.json

Two processes count for all the time, as two trainings would. Each line is run several times, in turns.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environment import command, describe, save
from hf_value_steer.cli.commands import COMMANDS


ROUNDS = 5
LINES = ["--help", "nothing", *(f"{name} {last}" for name in COMMANDS for last in ("--help", "--wrong"))]


def count() -> None:
    """Keep a core busy."""
    while True:
        pass


def seconds(line: str) -> float:
    """How long a line takes, from the start of Python to its end."""
    words = [Path(sys.executable).with_name("hf-value-steer"), *line.split()]
    start = time.perf_counter()
    subprocess.run(words, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    busy = [multiprocessing.Process(target=count, daemon=True) for _ in range(2)]
    for process in busy:
        process.start()
    rounds = [{line: seconds(line) for line in LINES} for _ in range(ROUNDS)]
    found = {line: [each[line] for each in rounds] for line in LINES}
    lines = {
        line: {"median_s": round(statistics.median(times), 3), "most_s": round(max(times), 3)}
        for line, times in found.items()
    }
    slowest = max(line["most_s"] for line in lines.values())
    print(f"slowest of {len(lines)} lines, {ROUNDS} times each: {slowest:.2f} s")
    document = {"command": command(), **describe(), "busy_processes": len(busy), "slowest": slowest, "lines": lines}
    save(document, arguments.output)


if __name__ == "__main__":
    main()
