"""What going back costs: time as ratios to plain `generate` inside one run, the lag of a streamer, and memory.

    python -m benchmarks.rollback --output benchmarks/results/rollback.json

SmolLM2-135M. Plain `generate` and all steered runs of a batch size are under way at once and take turns, a token each.
The heads' values are prescribed by a timetable: of the steps of a row 1.5 % have a rejected natural sample. Of these
one in fifteen is a dead end, where all alternatives are rejected, too, and at least one. So it was with the real heads
(`benchmarks/results/going-back.json`: 137 tokens replaced, 10 dead ends). The search accepts the first candidate that
it tries, one place before, and the first one behind it. How much of this there really was stands beside the times.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation import BaseStreamer

from benchmarks.environment import command, describe, save
from benchmarks.rollback_memory import memory
from benchmarks.timing import WARM_UP, Prompt, Turns, in_turns, summary
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, value_steer_generate
from hf_value_steer.backbone.parts import feature_width
from hf_value_steer.heads.value_head import ValueHeadOutput


CANDIDATES, BACK, RATE, DEAD_EVERY = 8, 6, 0.015, 15  # one in DEAD_EVERY rejections is a dead end
NEW_TOKENS = {1: 536, 16: 272}  # by batch size: 8 rejections and one dead end, 65 and four
PROMPT = 64  # tokens
OK, BAD = 0.1, 0.9
SAMPLING = {"do_sample": True, "top_k": 0, "eos_token_id": None}


class TimetableHead(ValueHead):
    """A real MLP head whose values are then replaced by a timetable.

    [`Clock`] tells it when a step of the batch begins. The first natural samples `(rows, width)` after that are the
    batch's, and are rejected by the timetable; their alternatives `(rows, K, width)` are rejected at dead ends. All
    others belong to a search, and are accepted.
    """

    def follow(self, rejected: Tensor, dead: Tensor) -> None:
        """Begin a text. Both `(batch, steps)`: where natural samples are rejected, and all alternatives, too."""
        self.rejected, self.dead, self.step, self.ready = rejected, dead, -1, False

    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None, memory: Tensor | None = None
    ) -> ValueHeadOutput:
        output = super().forward(hidden_states, labels, memory)
        assert output.value is not None
        values = torch.full_like(output.value, OK)
        if hidden_states.dim() == 3:
            values[self.dead[self.rejected[:, self.step], self.step]] = BAD
        elif self.ready:
            self.ready = False
            values[self.rejected[:, self.step]] = BAD
        output.value = values
        return output


class Clock(LogitsProcessor):  # type: ignore[misc]
    """Tells a head that a step of the batch begins: then the text is longer than it ever was."""

    def __init__(self, head: TimetableHead):
        self.head, self.longest = head, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.longest:
            self.longest, self.head.ready, self.head.step = input_ids.shape[1], True, self.head.step + 1
        return scores


class TurnsOfSteps(Turns):
    """Hands over after every step of the batch, and not in a search, whose text is no longer than before."""

    longest = 0

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        if input_ids.shape[1] > self.longest:
            self.longest = input_ids.shape[1]
            return super().__call__(input_ids, _scores)
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)


@dataclass(frozen=True)
class Run:
    """One steered run: its head's layer, the share of natural samples that is rejected, and `rollback`."""

    layer: int | str
    rate: float
    back: int

    @property
    def name(self) -> str:
        where = "final state" if self.layer == "final" else f"layer {self.layer}"
        rejected = f", {100 * self.rate:g} % rejected" if self.rate else ""
        return f"lazy, {where}{rejected}, rollback={self.back}"


_JUDGED: tuple[tuple[int | str, float], ...] = ((11, 0.0), ("final", 0.0), (11, RATE))
RUNS = [Run(layer, rate, back) for layer, rate in _JUDGED for back in (0, BACK)]


def timetable(batch: int, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Where natural samples are rejected, and which of these places are dead ends, `(batch, steps)` each."""
    rejected = torch.zeros(batch, steps, dtype=torch.bool)
    dead = torch.zeros_like(rejected)
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(batch * (steps - 1), generator=generator)[: round(rate * batch * steps)].sort().values
    step, row = places // batch + 1, places % batch  # not the first step: before it there is nothing to go back to
    rejected[row, step] = True
    ends = slice(DEAD_EVERY // 2 - 1, None, DEAD_EVERY)
    dead[row[ends], step[ends]] = True
    return rejected, dead


def make_head(model: PreTrainedModel, layer: int | str) -> TimetableHead:
    config = ValueHeadConfig(hidden_size=feature_width(model), feature_layers=[layer], threshold=0.5)
    return TimetableHead(config).to(model.device)  # type: ignore[no-any-return]


def steer(head: TimetableHead, run: Run, batch: int, steps: int) -> dict[str, Any]:
    """What `generate` is given for a run."""
    head.follow(*timetable(batch, steps, run.rate))
    config = ValueFilterConfig(value_head=head, num_candidates=CANDIDATES, rollback=run.back)
    given = {"value_steer": config, "custom_generate": value_steer_generate, "return_dict_in_generate": True}
    return {**SAMPLING, **given, "max_new_tokens": steps, "logits_processor": [Clock(head)]}


def happened(output: Any) -> dict[str, int]:
    """What a run has really done."""
    taken = output.get("taken_back_steps")
    return {
        "interventions": int(output.interventions.sum()),
        "looks": int((output.candidates_evaluated > 1).any(dim=0).sum()),
        "dead_ends_left": int(output.dead_ends.sum()),
        "tokens_taken_back": 0 if taken is None else int((taken >= 0).sum()),
    }


def measure(model: PreTrainedModel, batch: int, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Ratios to plain `generate` of all runs of a batch size, and of runs with `rollback` to those without."""
    prompt, heads = Prompt(model, batch, PROMPT), [make_head(model, run.layer) for run in RUNS]
    outputs: list[list[dict[str, int]]] = [[] for _ in RUNS]

    def plain(length: int, turns: Turns) -> None:
        turns = TurnsOfSteps(turns.hand_over)
        model.generate(**prompt.inputs("dynamic"), **SAMPLING, max_new_tokens=length, stopping_criteria=[turns])

    def steered(index: int, length: int, turns: Turns) -> None:
        given = steer(heads[index], RUNS[index], batch, length)
        turns = TurnsOfSteps(turns.hand_over)
        output = model.generate(**prompt.inputs("dynamic"), **given, stopping_criteria=[turns])
        outputs[index].append(happened(output))

    def seconds(length: int) -> list[float]:
        players: list[Callable[[Turns], None]] = [partial(plain, length)]
        players += [partial(steered, index, length) for index in range(len(RUNS))]
        return [sum(turns) for turns in in_turns(*players)]

    torch.manual_seed(0)
    seconds(WARM_UP)
    times = [seconds(new_tokens) for _ in range(rounds)]
    return [case(times, index, batch, new_tokens, outputs[index][1:]) for index in range(len(RUNS))]


def case(
    times: list[list[float]], index: int, batch: int, new_tokens: int, outputs: list[dict[str, int]]
) -> dict[str, Any]:
    """The numbers of one run.

    Args:
        times: seconds by round and run; plain `generate` is the first.
        outputs: what the run has done in each round.
    """
    run = RUNS[index]
    without = RUNS.index(Run(run.layer, run.rate, 0))
    untouched = RUNS.index(Run(run.layer, 0.0, 0))
    rejected, dead = timetable(batch, new_tokens, run.rate)
    found = {
        "name": run.name,
        **vars(run),
        "batch": batch,
        "new_tokens": new_tokens,
        **summary([each[1 + index] / each[0] for each in times]),
        "to_rollback_0": summary([each[1 + index] / each[1 + without] for each in times]),
        "above_untouched": round(
            statistics.median((each[1 + index] - each[1 + untouched]) / each[0] for each in times), 3
        ),
        "planned": {"rejections": int(rejected.sum()), "dead_ends": int(dead.sum())},
        "happened": outputs,
    }
    return found | {"goals": goals(found)}


def goals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What this run should not exceed, and whether it does."""
    if not found["back"]:
        return {}
    if not found["rate"]:
        limits = {"to_rollback_0": (found["to_rollback_0"]["ratio_median"], 1.01)}
    elif found["batch"] == 1:
        limits = {"above_untouched": (found["above_untouched"], 0.03)}
    else:
        limits = {"ratio": (found["ratio_median"], 1.10)}
    return {name: {"limit": limit, "met": number <= limit} for name, (number, limit) in limits.items()}


class Stamps(BaseStreamer):  # type: ignore[misc]
    """When each token was decided, and when it was handed out."""

    def __init__(self) -> None:
        self.decided, self.handed_out, self.behind = list[float](), list[float](), list[int]()

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:  # else it is the prompt
            self.handed_out.append(time.perf_counter())
            self.behind.append(len(self.decided) - len(self.handed_out))

    def end(self) -> None:
        """Nothing to do."""


def lag(model: PreTrainedModel, batch: int, new_tokens: int, back: int) -> dict[str, Any]:
    """How far a streamer is behind, in tokens and in milliseconds, where nothing is rejected."""
    prompt, stamps, head = Prompt(model, batch, PROMPT), Stamps(), make_head(model, 11)
    turns = Turns(lambda: stamps.decided.append(time.perf_counter()))
    given = steer(head, Run(11, 0.0, back), batch, new_tokens)
    torch.manual_seed(0)
    given |= {"stopping_criteria": [turns], "token_streamer": stamps}
    model.generate(**prompt.inputs("dynamic"), **given)
    kept = slice(1, new_tokens - back)  # the last ones are handed out at the end, all at once
    behind = [out - in_ for in_, out in zip(stamps.decided, stamps.handed_out, strict=True)][kept]
    steps = [after - before for before, after in zip(stamps.decided, stamps.decided[1:], strict=False)]
    return {
        "batch": batch,
        "rollback": back,
        "tokens": max(stamps.behind[kept]),
        "milliseconds": round(1000 * statistics.median(behind), 2),
        "step_milliseconds": round(1000 * statistics.median(steps), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="few tokens, to try it")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "command": command(),
        **describe(),
        "candidates": CANDIDATES,
        "rate": RATE,
        "dead_end_every": DEAD_EVERY,
        "panels": [],
        "lags": [],
        "memory": [],
    }
    if arguments.output and arguments.output.exists():  # a run that was stopped goes on
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
        report |= {name: before[name] for name in ("panels", "lags", "memory")}
    there = {panel["title"] for panel in report["panels"]}
    for dtype in ("float32", "bfloat16"):
        model, _ = load_backbone(getattr(torch, dtype))
        for batch, whole in NEW_TOKENS.items():
            if (title := f"{dtype}, batch {batch}") in there:
                continue
            new_tokens = whole // 8 if arguments.tiny else whole
            cases = measure(model, batch, new_tokens, arguments.rounds)
            report["panels"].append({"title": title, "dtype": dtype, "batch": batch, "cases": cases})
            for each in cases:
                done = f"{each['ratio_median']:.3f}  {each['to_rollback_0']['ratio_median']:.3f}"
                print(f"{title:20s} {each['name']:45s} {done}  {each['happened'][-1]}  {each['goals']}", flush=True)
            report["lags"] += [{"dtype": dtype, **lag(model, batch, 40, back)} for back in (0, BACK)]
            if arguments.output:
                save(report, arguments.output)
    report["memory"] = report["memory"] or memory()
    for each in report["memory"]:
        print(each)
    if arguments.output:
        save(report, arguments.output)


if __name__ == "__main__":
    main()
