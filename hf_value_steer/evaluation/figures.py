"""Which charts an evaluation document fills; a part without data gives no chart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from hf_value_steer.cards.document import (
    TIMES,
    Evaluation,
    Run,
    coverage_curve,
    factor,
    main_run,
    number,
    percent,
    rate_name,
)
from hf_value_steer.evaluation.axes import Axis, linear, logarithmic, odds
from hf_value_steer.evaluation.charts import STRIP, Chart, Point, Rule, Series
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace


# Method: its name where several runs share it, and its marker.
_METHODS = {
    "base": ("base", "circle"),
    "filter": ("filter", "circle"),
    "abstain": ("abstention", "circle"),
    "placebo": ("placebo", "cross"),
    "best_of_n": ("best of N", "square"),
    "args": ("ARGS", "diamond"),
    "system_prompt": ("system prompt", "up"),
    "bad_words": ("bad words", "down"),
}


def _percent(value: float) -> str:
    return f"{100 * value:.6g} %"


def pareto_charts(evaluation: Evaluation, judge: str, name: str) -> list[Chart]:
    """The rate by one judge against the perplexity ratio, and against the intervention rate."""
    costs = {
        "perplexity_ratio": ("perplexity, relative to base", "against perplexity"),
        "intervention_rate": ("steps intervened", "against steps intervened"),
    }
    charts = [_pareto(evaluation, judge, f"{name}-{key}", key, *texts) for key, texts in costs.items()]
    return [chart for chart in charts if chart is not None]


def _pareto(evaluation: Evaluation, judge: str, name: str, cost: str, label: str, against: str) -> Chart | None:
    rate = rate_name(evaluation)
    series = [one for one in _series(evaluation, judge, cost) if one.points]
    points = [point for one in series for point in one.points]
    if len(points) < 2:
        return None
    reach = [bound for point in points for bound in (point.x, *(point.x_interval or ()))]
    base = evaluation["runs"][0]["judges"][judge]["rate"]
    if cost == "intervention_rate":
        x = linear(label, [0.0, *reach], _percent, tight=True)
    elif max(reach) > 4 * min(reach):
        x = logarithmic(label, reach, lambda value: f"{TIMES}{value:g}")
    else:
        x = linear(label, reach, lambda value: f"{TIMES}{value:.6g}", tight=True)
    heights = [bound for point in points for bound in (point.y, *(point.y_interval or ()))]
    return Chart(
        name=name,
        title=f"{rate[0].upper()}{rate[1:]} {against}",
        note=f"Judge: {judge}",
        x=x,
        y=linear("rate", [0.0, *heights], _percent),
        series=series,
        rules=[Rule("" if series[0].style.startswith("m-base") else "base", base)],
    )


def _series(evaluation: Evaluation, judge: str, cost: str) -> list[Series]:
    """One series for each method, or for each number of candidates of a method that has a threshold."""
    groups: dict[tuple[str, int | None], list[Run]] = {}
    for run in evaluation["runs"]:
        groups.setdefault((run["method"], run["num_candidates"] if run["threshold"] else None), []).append(run)
    main, seen, found = main_run(evaluation), dict.fromkeys(_METHODS, 0), []
    for (method, candidates), runs in groups.items():
        title, marker = _METHODS[method]
        if len(runs) == 1:
            title = runs[0]["name"]
        elif candidates:
            title = f"{title}, K={candidates}"
        ordered = sorted(runs, key=lambda run: run["threshold"] or run["num_candidates"] or 0)
        points = [_point(run, judge, cost, len(runs) > 1, run is main) for run in ordered if _has(run, judge, cost)]
        found.append(
            Series(title, points, f"m-{method} k{seen[method] % 4}", "straight" if len(runs) > 1 else "", marker)
        )
        seen[method] += 1
    return found


def _has(run: Run, judge: str, cost: str) -> bool:
    return run.get(cost) is not None and judge in run["judges"]


def _point(run: Run, judge: str, cost: str, several: bool, ring: bool) -> Point:
    judged, interval = run["judges"][judge], run.get(f"{cost}_interval")
    varied = f"c={run['threshold']:.3g}" if run["threshold"] else f"N={run['num_candidates']}"
    text = factor if cost == "perplexity_ratio" else percent
    about = "perplexity" if cost == "perplexity_ratio" else "intervened"
    return Point(
        x=run[cost],
        y=judged["rate"],
        tip=f"{run['name']}\nrate {percent(judged['rate'], judged['rate_interval'])}\n"
        f"{about} {text(run[cost], interval)}",
        label=varied if several else run["name"],
        x_interval=interval,
        y_interval=judged["rate_interval"],
        ring=ring,
    )


def calibration_chart(evaluation: Evaluation) -> Chart | None:
    """The threshold for each alpha, of all texts and of each group; where none keeps the promise, the chart is barred.

    Mode "martingale" has no threshold of values, but a least growth of their log odds.
    """
    calibration = evaluation["calibration"]
    if not calibration or not calibration["curve"]:
        return None
    martingale = calibration["mode"] == "martingale"
    name = "least growth of the log odds" if martingale else "threshold"
    own = None if martingale else evaluation["head"]["threshold"]
    curves = {"all texts" if calibration.get("groups") else name: calibration["curve"]}
    curves |= {group: held["curve"] for group, held in (calibration.get("groups") or {}).items()}
    series = [
        Series(each, _curve(curve, name), f"m-filter k{i % 4}", "step")
        for i, (each, curve) in enumerate(curves.items())
    ]
    curve = sorted(calibration["curve"], key=lambda entry: float(entry["alpha"]))
    barred = [entry["alpha"] for entry in takewhile(lambda entry: entry["threshold"] is None, curve)]
    heights = [point.y for one in series for point in one.points] + ([own] if own else [])
    none = [
        Point(alpha, min([0.0, *heights]), f"alpha {alpha:g}\nno {name} keeps the promise", radius=3.5)
        for alpha in barred
    ]
    return Chart(
        name="calibration",
        title=f"{name[0].upper()}{name[1:]} for each alpha",
        note="Each is valid for every larger alpha too: hence the steps.",
        x=logarithmic("alpha", [entry["alpha"] for entry in curve], lambda value: f"{value:g}"),
        y=linear(name, [0.0, *(heights or [1.0])], lambda value: f"{value:.6g}"),
        series=[*series, Series("nothing can be promised", none, "m-none", "", "cross")],
        rules=[Rule(f"own threshold {own:.4g}", own)] if own else [],
        barred=max(barred, default=None),
        barred_label="nothing can be promised",
        keyed=len(series) > 1,
    )


def _curve(curve: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    kept = sorted((entry["alpha"], entry["threshold"]) for entry in curve if entry["threshold"] is not None)
    return [Point(alpha, threshold, f"alpha {alpha:g}\n{name} {threshold:.4g}", radius=3) for alpha, threshold in kept]


def reliability_chart(evaluation: Evaluation) -> Chart | None:
    """How often the judge agrees, for each range of values; the area of a point is the number of values."""
    bins = [entry for entry in evaluation["reliability"] or [] if entry["count"]]
    if not bins:
        return None
    most = max(entry["count"] for entry in bins)
    points = [
        Point(
            entry["mean_value"],
            entry["rate"],
            f"values from {entry['lower']:.3g} to {entry['upper']:.3g}: {entry['count']:,}\n"
            f"mean value {entry['mean_value']:.3f}\nrate {percent(entry['rate'])}",
            radius=3 + 7 * (entry["count"] / most) ** 0.5,
        )
        for entry in bins
    ]
    reach = [0.0, *(entry[key] for entry in bins for key in ("mean_value", "rate"))]
    return Chart(
        name="reliability",
        title="Reliability of values",
        note="On the diagonal a value is a probability. Larger points hold more.",
        x=linear("mean value", reach, lambda value: f"{value:.6g}"),
        y=linear("measured rate", reach, lambda value: f"{value:.6g}"),
        series=[Series("range of values", points, "m-filter k0")],
        rules=[Rule("")],
    )


def coverage_charts(evaluation: Evaluation) -> list[Chart]:
    """Accuracy of the answers that are given, and tokens saved, against the share of prompts that get one."""
    entries = coverage_curve(evaluation)
    if len(entries) < 2:
        return []
    x = linear("coverage: share of prompts answered", [0.0, 1.0], _percent)
    accuracy = [Point(entry["coverage"], entry["accuracy"], _coverage_tip(entry)) for entry in entries]
    reach = [*(point.y for point in accuracy), *(bound for e in entries for bound in e["accuracy_interval"] or ())]
    band = [(e["coverage"], *e["accuracy_interval"]) for e in entries if e["accuracy_interval"]]
    charts = [
        Chart(
            name="coverage",
            title="Accuracy of what is answered",
            note="The band is the 95 % interval.",
            x=x,
            y=linear("accuracy", [0.0, *reach], _percent),
            series=[Series("accuracy", accuracy, "m-filter k0")],
            bands=[("m-filter k0", band)] if len(band) > 1 else [],
            rules=[Rule("every prompt answered", entry["accuracy"]) for entry in entries if entry["coverage"] == 1],
        )
    ]
    saved = [
        Point(entry["coverage"], entry["tokens_saved"], _coverage_tip(entry))
        for entry in entries
        if entry["tokens_saved"] is not None
    ]
    if len(saved) > 1:
        y = linear("tokens saved", [0.0, *(point.y for point in saved)], _percent)
        series = [Series("tokens saved", saved, "m-args k0")]
        charts.append(
            Chart("saved", "Tokens saved by stopping early", "Against answering every prompt.", x, y, series)
        )
    return charts


def _coverage_tip(entry: Mapping[str, Any]) -> str:
    lines = [
        f"coverage {percent(entry['coverage'])}",
        f"accuracy {percent(entry['accuracy'], entry['accuracy_interval'])}",
        f"threshold {number(entry['threshold'], 4)}",
        f"tokens saved {percent(entry['tokens_saved'])}",
    ]
    return "\n".join(lines)


def trajectory_chart(name: str, trace: PromptTrace, threshold: float) -> Chart:
    """The value of every token, base and steered, with marks where a token was replaced."""
    values = [token.value for token in (*trace.base, *trace.steered)]
    length = max(len(trace.base), len(trace.steered), 2)
    ticks = [index for index in range(1, length + 1) if index == 1 or index % (5 if length < 60 else 20) == 0]
    y = odds("value", [*values, threshold])
    clear = [tick for tick in y.ticks if abs(y.place(tick) - y.place(threshold)) > 0.13]
    return Chart(
        name=name,
        title="Values",
        note="",
        x=Axis("", 1, length, ticks, lambda step: "token 1" if step == 1 else f"{step:g}"),
        y=replace(y, ticks=[*clear, threshold]),
        series=[
            Series("base", _path(trace.base), "m-base k0"),
            Series("steered", _path(trace.steered), "m-filter k0"),
        ],
        rules=[Rule("", threshold)],
        sizes=STRIP,
    )


def _path(tokens: Sequence[TokenTrace]) -> list[Point]:
    return [Point(step, token.value, radius=4 * token.intervened) for step, token in enumerate(tokens, start=1)]
