"""`python -m tests.rehearsal`: the whole grid; `--table FILE` writes how often the host waits for the device."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_value_steer import (
    AbstentionConfig,
    ActivationConfig,
    GuidanceConfig,
    ValueFilterConfig,
    ValueHead,
    value_steer_generate,
)
from tests.families import accepting_head, build, prompts
from tests.parity.test_guidance import make_module
from tests.rehearsal.grid import KERNELS, cases, on_cuda, rehearse, waits
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


STEPS = 8
_PAGE = """# How often the host waits for the device

A step of `generate` on a GPU is fast as long as the host only gives orders. Whenever it asks for a result, it waits
until the device is done with everything before. Counted on tensors that only say that they are on a GPU
([tests/rehearsal](../tests/rehearsal)), a tiny Llama, two rows, float32, greedy: waits in one step, and where. Nothing
here was measured on a GPU.

{table}

`python -m tests.rehearsal --table docs/synchronisations.md`, transformers {transformers}, torch {torch}.
"""


def rows() -> Iterator[tuple[str, Counter[tuple[str, str]]]]:
    model = build("llama")
    accepting, rejecting, lower, lower_rejecting = (accepting_head(model) for _ in range(4))
    lower.config.feature_layers = lower_rejecting.config.feature_layers = [0]
    with torch.no_grad():
        rejecting.net[0].bias.fill_(20.0)
        lower_rejecting.net[0].bias.fill_(20.0)
    vectors, module = random_vectors(model).scale(model, SEQUENCES), make_module(model)
    with on_cuda(model, accepting, rejecting, lower, lower_rejecting, module) as move:

        def count(**arguments: Any) -> Counter[tuple[str, str]]:
            return waits(model, move(prompts(2)), **arguments)

        def steer(config: Any, **options: Any) -> Counter[tuple[str, str]]:
            return count(custom_generate=value_steer_generate, value_steer=config, **options)

        def filtering(head: ValueHead, **options: Any) -> ValueFilterConfig:
            return ValueFilterConfig(value_head=head, threshold=0.9, num_candidates=4, seed=1, **options)

        yield "plain `generate`", count()
        yield "abstention", steer(AbstentionConfig(value_head=accepting, threshold=0.9))
        yield "vectors", steer(ActivationConfig(vectors=vectors, multiplier=2.0))
        yield "guidance", steer(GuidanceConfig(module=module))
        yield "filter, lazy, nothing rejected", steer(filtering(accepting))
        yield "filter, lazy, nothing rejected, rollback", steer(filtering(accepting, rollback=4))
        for kernel in KERNELS:
            yield f"filter, lazy, all rejected, {kernel}", steer(filtering(rejecting, lookahead=kernel))
        for kernel in KERNELS:
            yield f"filter, eager, {kernel}", steer(filtering(accepting, evaluation="eager", lookahead=kernel))
        static = {"cache_implementation": "static", "disable_compile": True}
        yield "plain `generate`, static cache", count(**static)
        for name, head in (("nothing", lower), ("all", lower_rejecting)):
            config = filtering(head)
            yield f"filter at a layer, lazy, {name} rejected", steer(config)
        for kernel in KERNELS:
            config = filtering(lower, evaluation="eager", lookahead=kernel)
            yield f"filter at a layer, eager, {kernel}, static cache", steer(config, **static)


def table() -> str:
    lines = ["| | waits in a step | where (of eight steps) |", "| --- | --- | --- |"]
    for name, counted in rows():
        places: Counter[str] = Counter()
        for (kind, place), number in counted.items():
            places[f"{kind}: {place}"] += number
        where = ", ".join(f"`{place}` {number}" for place, number in places.most_common())
        lines.append(f"| {name} | {counted.total() / STEPS:.3g} | {where} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page of waits, instead of the grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table is not None:
        page = _PAGE.format(table=table(), transformers=transformers.__version__, torch=torch.__version__)
        arguments.table.write_text(page, encoding="utf-8")
        return 0
    start, failed, grid = time.perf_counter(), [], cases()
    for case in grid:
        try:
            rehearse(case)
        except Exception as error:
            failed.append(case)
            print(f"{case}: {type(error).__name__}: {error}")
    print(f"{len(grid) - len(failed)} passed, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
