"""What steering costs on this machine: checks of the doctor that time something."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from hf_value_steer.doctor.context import Check, Context
from hf_value_steer.doctor.probes import timed


PAIRS, TIMED_TOKENS = 3, 32
ROWS = (1, 8)  # of the batches in which steps are timed


def check_speed(context: Context) -> Check:
    """What steering without interventions costs."""
    input_ids, config = context.prompts(1, seed=4), context.accepting()
    context.steer(input_ids, config, new_tokens=2)
    plain, steered = [], []
    for _ in range(PAIRS):
        plain.append(_seconds(lambda: context.generate(input_ids, TIMED_TOKENS)))
        steered.append(_seconds(lambda: context.steer(input_ids, config, new_tokens=TIMED_TOKENS)))
    numbers = {
        "plain_tokens_per_second": TIMED_TOKENS / statistics.median(plain),
        "steered_tokens_per_second": TIMED_TOKENS / statistics.median(steered),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(steered, plain, strict=True)),
    }
    speeds = f"{numbers['plain_tokens_per_second']:.1f} plain, {numbers['steered_tokens_per_second']:.1f} steered"
    ratio = f"steered takes {numbers['ratio']:.2f} times as long, the median of {PAIRS} pairs"
    return Check("speed", "info", f"tokens/s {speeds}; {ratio}", numbers)


def check_evaluation(context: Context) -> Check:
    """Which steps `evaluation="auto"` takes, by what they cost here."""
    numbers: dict[str, float] = {}
    said = []
    for rows in ROWS:
        costs = context.generate(context.prompts(rows, seed=5), custom_generate=timed(context.reading()))
        numbers |= {f"{name}_{rows}": seconds for name, seconds in vars(costs).items()}
        numbers[f"break_even_{rows}"] = costs.break_even
        times = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in vars(costs).items())
        said.append(f"{rows} row(s): {times} ms, {_cheaper(costs.break_even)}")
    return Check("evaluation", "info", "; ".join(said), numbers)


def _cheaper(break_even: float) -> str:
    if break_even >= 1:
        return "lazy steps are cheaper"
    return f"eager steps are cheaper where {100 * max(break_even, 0):.0f} % of the lazy ones look at alternatives"


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
