"""Cost of heads on a layer against its depth, as ratios inside one run.

    python -m benchmarks.depth --output benchmarks/results/depth.json
    python -m benchmarks.depth --picture docs/depth.png benchmarks/results/depth.json

SmolLM2-135M, 30 layers. Plain `generate` and all steered runs of a batch size are under way at once and take turns, a
token each. The heads' values are prescribed: 5 % of the natural samples are rejected in lazy runs. What a look at
alternatives costs is the time of steps with one above that of the steps without one of the same run, each divided by
that of plain `generate` in the same turn.

Beside each cost stands a bound that counts what cannot be saved: in a lazy step the weights up to the layer are read
once more whenever a row is looked at, in an eager step nothing is read twice; and K tokens instead of one are
multiplied up to the layer.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.environment import command, describe, save
from benchmarks.timing import WARM_UP, Prompt, Turns, in_turns, make_head, summary
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig, value_steer_generate


CANDIDATES, RATE = 8, 0.05
LAYERS: tuple[int | str, ...] = (3, 11, 19, "final")


@dataclass(frozen=True)
class Run:
    """One steered run: its head's layer, how it steps, and the share of natural samples that is rejected."""

    layer: int | str
    evaluation: str
    rate: float

    @property
    def name(self) -> str:
        where = "final state" if self.layer == "final" else f"layer {self.layer}"
        return f"{self.evaluation}, {where}" + (f", {100 * self.rate:g} % rejected" if self.rate else "")


RUNS = [
    *(Run(layer, "lazy", 0.0) for layer in (11, "final")),
    *(Run(layer, "lazy", RATE) for layer in LAYERS),
    *(Run(layer, "eager", 0.0) for layer in LAYERS),
]


def share(layer: int | str, layers: int) -> float:
    """What part of the layers has run when the head can be asked."""
    return 1.0 if layer == "final" else (int(layer) + 1) / layers


def bounds(run: Run, batch: int, layers: int) -> dict[str, float]:
    """Cost relative to plain `generate` if nothing but reading weights, or nothing but products, took time."""
    part = share(run.layer, layers)
    if run.evaluation == "eager":
        return {"weights": 1.0, "products": 1 + part * (CANDIDATES - 1)}
    looks = 1 - (1 - run.rate) ** batch
    return {"weights": 1 + looks * part, "products": 1 + run.rate * part * (CANDIDATES - 1)}


def measure(model: PreTrainedModel, batch: int, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Ratios to plain `generate` of all runs of a batch size."""
    prompt = Prompt(model, batch, 64)
    arguments = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "eos_token_id": None}
    heads = [make_head(model, run.rate, run.layer) for run in RUNS]
    looked: list[list[Tensor]] = [[] for _ in RUNS]

    def plain(length: int, turns: Turns) -> None:
        model.generate(**prompt.inputs("dynamic"), **arguments, max_new_tokens=length, stopping_criteria=[turns])

    def steered(index: int, length: int, turns: Turns) -> None:
        heads[index].step = -1
        config = ValueFilterConfig(
            value_head=heads[index], num_candidates=CANDIDATES, evaluation=RUNS[index].evaluation
        )
        steer = {"custom_generate": value_steer_generate, "value_steer": config}
        options = {"max_new_tokens": length, "stopping_criteria": [turns]}
        output = model.generate(**prompt.inputs("dynamic"), **arguments, **steer, **options)
        looked[index].append(output.candidates_evaluated > 1)

    def turn(length: int) -> list[list[float]]:
        players: list[Callable[[Turns], None]] = [partial(plain, length)]
        players += [partial(steered, index, length) for index in range(len(RUNS))]
        return in_turns(*players)

    torch.manual_seed(0)
    turn(WARM_UP)
    times = [turn(new_tokens) for _ in range(rounds)]
    layers = model.config.num_hidden_layers
    return [
        {
            "name": run.name,
            **vars(run),
            "batch": batch,
            "depth": round(share(run.layer, layers), 3),
            **summary([sum(each[1 + index]) / sum(each[0]) for each in times]),
            **({"look": look(times, index, looked[index][1:])} if run.rate else {}),
            "bounds": {name: round(bound, 3) for name, bound in bounds(run, batch, layers).items()},
        }
        for index, run in enumerate(RUNS)
    ]


def look(times: list[list[list[float]]], index: int, looked: list[Tensor]) -> dict[str, float]:
    """Cost of a step that looks at alternatives above one that does not, in steps of plain `generate`.

    Args:
        times: seconds by round, run (plain `generate` is the first) and turn.
        index (`int`): of the run.
        looked: by round, which tokens `(batch, tokens)` were looked at.
    """
    steps: dict[bool, list[float]] = {True: [], False: []}
    for plain_and_runs, tokens in zip(times, looked, strict=True):
        some = tokens.any(dim=0).tolist()
        for token in range(1, len(some)):  # the first turn has the prompt
            steps[some[token]].append(plain_and_runs[1 + index][token] / plain_and_runs[0][token])
    without, with_ = statistics.median(steps[False]), statistics.median(steps[True])
    rate = torch.cat(looked, dim=1).float().mean().item()
    return {"cost": round(with_ - without, 4), "steps": len(steps[True]), "without": round(without, 4), "rate": rate}


def interventions_cost(cases: list[dict[str, Any]], layer: int) -> float:
    """What interventions of a head at `layer` cost, as a share of what those of one on the final state cost."""
    costs = {case["layer"]: float(case["look"]["cost"]) for case in cases if "look" in case}
    return round(costs[layer] / costs["final"], 3)


def draw(document: dict[str, Any], path: Path) -> None:
    """Cost against depth, a panel for each batch size and dtype."""
    from matplotlib.figure import Figure

    panels = document["panels"]
    figure = Figure((4 * len(panels), 3.4), dpi=150, layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1, xlabel="depth of the head", title=panel["title"])
        if index == 0:
            axes.set_ylabel("time, plain generate = 1")
        for evaluation, rate, colour in (
            ("lazy", 0.0, "#b4bac5"),
            ("lazy", RATE, "#1d5fd0"),
            ("eager", 0.0, "#c2571a"),
        ):
            found = [case for case in panel["cases"] if (case["evaluation"], case["rate"]) == (evaluation, rate)]
            label = f"{evaluation}, K={CANDIDATES}" if evaluation == "eager" else f"lazy, {100 * rate:g} % rejected"
            places = [case["depth"] for case in found]
            axes.plot(places, [case["ratio_median"] for case in found], "o-", color=colour, label=label, ms=4)
            bound = "products" if panel["batch"] > 1 else "weights"
            axes.plot(places, [case["bounds"][bound] for case in found], ":", color=colour, lw=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0.95, min(axes.get_ylim()[1], 3.0))
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, nargs="?", help="draw this, and measure nothing")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.document:
        draw(json.loads(arguments.document.read_text("utf-8")), arguments.picture)
        return
    panels = []
    for dtype in ("float32", "bfloat16"):
        model, _ = load_backbone(getattr(torch, dtype))
        for batch in (1, 16):
            cases = measure(model, batch, 120 if batch == 1 else 32, arguments.rounds)
            panels.append({"title": f"{dtype}, batch {batch}", "dtype": dtype, "batch": batch, "cases": cases})
            panels[-1]["interventions_at_layer_11"] = interventions_cost(cases, 11)
            for case in cases:
                found = f"{case['ratio_median']:.3f}  {case.get('look', '')}  {case['bounds']}"
                print(f"{panels[-1]['title']:20s} {case['name']:40s} {found}")
            print(
                f"interventions at layer 11: {panels[-1]['interventions_at_layer_11']} of the final state's",
                flush=True,
            )
    report = {"command": command(), **describe(), "candidates": CANDIDATES, "panels": panels}
    if arguments.output:
        save(report, arguments.output)


if __name__ == "__main__":
    main()
