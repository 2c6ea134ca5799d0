"""The report of an evaluation: one self-contained page of HTML, SVG and CSS, without script and without requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_value_steer.cards.document import (
    COLUMNS,
    Evaluation,
    check_evaluation,
    flat,
    judge_title,
    judges,
    main_run,
    options,
    outcome_judge,
    outcome_note,
    verdicts,
)
from hf_value_steer.evaluation import figures, summary
from hf_value_steer.evaluation.charts import Chart
from hf_value_steer.evaluation.pages import render
from hf_value_steer.evaluation.trace import Colours, PromptTrace, TokenTrace


Card = tuple[PromptTrace, PromptTrace, Chart]  # an example, the same with words hidden, and its values


def render_report(evaluation: Evaluation) -> str:
    """The page of an evaluation, for a laptop and a phone, light and dark.

    Args:
        evaluation (`dict`): what is in `evaluation.json`. Parts that are null or empty are left out of the page. With
            `"masked_examples"`, which is `"examples"` token for token with words hidden, the page holds both behind
            a switch.

    Returns:
        One HTML file.

    Raises:
        ValueError: if this is no evaluation document, or its masked examples are not those of its examples.
    """
    check_evaluation(evaluation)
    head, names, main = evaluation["head"], judges(evaluation), main_run(evaluation)
    threshold = evaluation.get("examples_threshold") or (main or head)["threshold"]
    titles = [judge_title(evaluation, name) for name in names]
    pareto = [figures.pareto_charts(evaluation, name, f"pareto-{index}") for index, name in enumerate(names)]
    charts = [figures.calibration_chart(evaluation), figures.reliability_chart(evaluation)]
    about = {"backbone fingerprint": head["backbone_fingerprint"], "seed": evaluation["seed"]}
    return render(
        "report.html",
        title=summary.title(evaluation),
        head=head,
        lead=summary.lead(evaluation),
        tiles=summary.tiles(evaluation),
        judges=titles,
        pareto=pareto if any(pareto) else [],
        series={one.name: one for held in pareto for chart in held for one in chart.series}.values(),
        columns=[COLUMNS[key][0] for key in summary.columns(evaluation)],
        rows=summary.rows(evaluation),
        main=main,
        calibration=evaluation["calibration"],
        calibrated=_calibrated(evaluation["calibration"]),
        calibration_charts=[chart for chart in charts if chart is not None],
        coverage_charts=figures.coverage_charts(evaluation),
        groups=_groups(evaluation, threshold) if evaluation["examples"] and threshold is not None else [],
        outcome_judge=judge_title(evaluation, outcome_judge(evaluation)),
        good=verdicts(evaluation)[1],
        masked_by=_masked_by(evaluation),
        colours=threshold and Colours(threshold, head["polarity"]),
        reveal=bool(evaluation.get("masked_examples")),
        about=flat({**about, "sampling": options(evaluation["sampling"]), **evaluation["environment"]}),
    )


def _calibrated(calibration: Mapping[str, Any] | None) -> dict[str, str]:
    """How thresholds were found."""
    if not calibration:
        return {}
    delta = calibration["delta"]
    known = {
        "mode": calibration["mode"],
        "texts": f"{calibration['n']:,}",
        "confidence": None if delta is None else f"{100 * (1 - delta):g} %",
        "kernel": calibration.get("kernel"),
        "backend": calibration.get("backend"),
        "sampling": options(calibration.get("sampling") or {}) or None,
    }
    return flat(known)


@dataclass(frozen=True)
class Group:
    """The examples of one outcome; `name` is empty where a document does not tell them apart."""

    name: str
    note: str
    cards: list[Card]


def _groups(evaluation: Evaluation, threshold: float) -> list[Group]:
    cards = _cards(evaluation, threshold)
    names = [example.get("outcome", "") for example in evaluation["examples"]]
    return [
        Group(
            name,
            outcome_note(evaluation, name),
            [card for card, each in zip(cards, names, strict=True) if each == name],
        )
        for name in dict.fromkeys(names)
    ]


def _masked_by(evaluation: Evaluation) -> str:
    mask = evaluation.get("mask") or ""
    return "" if mask == "none" else f"what {mask} hides" if mask.startswith("python:") else mask


def _cards(evaluation: Evaluation, threshold: float) -> list[Card]:
    traces = [_trace(example) for example in evaluation["examples"]]
    masked = [_trace(example) for example in evaluation.get("masked_examples") or evaluation["examples"]]
    if list(map(_shape, traces)) != list(map(_shape, masked)):
        raise ValueError("`masked_examples` has to be `examples` token for token, with words hidden in place.")
    charts = [figures.trajectory_chart(f"path-{i}", trace, threshold) for i, trace in enumerate(traces, start=1)]
    return list(zip(traces, masked, charts, strict=True))


def _trace(example: Mapping[str, Any]) -> PromptTrace:
    base, steered = ([TokenTrace(**token) for token in example[side]] for side in ("base", "steered"))
    return PromptTrace(example["prompt"], base, steered)


def _shape(trace: PromptTrace) -> list[list[tuple[float, int, int, int]]]:
    """What masking does not change."""
    sides = (trace.base, trace.steered)
    return [
        [(token.value, len(token.text), len(token.candidates), len(token.taken_back)) for token in side]
        for side in sides
    ]
