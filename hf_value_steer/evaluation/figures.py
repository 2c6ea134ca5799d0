"""Which charts an evaluation document fills; a part without data gives no chart."""

from collections.abc import Mapping, Sequence
from itertools import cycle, takewhile
from typing import TYPE_CHECKING, Any

from hf_value_steer.cards.document import (
    TIMES,
    Evaluation,
    Run,
    coverage_curve,
    factor,
    judge_title,
    main_run,
    number,
    percent,
    rate_name,
    reliability_judge,
)
from hf_value_steer.evaluation.charts import COLOURS, STRIP, Chart, Point, Series, logarithmic, percents, reference
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Method: its name where several runs share it, its colours, its line and its marker.
_FILTER = tuple(f"s-filter{index}" for index in range(4))
_METHODS = {
    "base": ("base", ("ink",), "--", "o"),
    "filter": ("filter", _FILTER, "-", "o"),
    "abstain": ("abstention", _FILTER, "-", "o"),
    "rollback": ("filter, going back", ("s-best",), "-", "o"),
    "soft": ("soft selection", ("s-args",), "-", "o"),
    "end": ("ending instead", ("s-prompt",), "-", "o"),
    "in_the_loop": ("judge in the loop", ("s-words", "s-placebo"), "-", "X"),
    "placebo": ("placebo", ("s-placebo",), ":", "P"),
    "best_of_n": ("best of N", ("s-best",), "-", "s"),
    "args": ("ARGS", ("s-args",), "-", "D"),
    "system_prompt": ("system prompt", ("s-prompt",), "-", "^"),
    "bad_words": ("bad words", ("s-words",), "-", "v"),
}


def pareto_charts(evaluation: Evaluation, judge: str, name: str) -> list[Chart]:
    """The rate by one judge against what it costs: perplexity, steps intervened, and safe texts touched."""
    costs = {
        "perplexity_ratio": ("perplexity, relative to base", "against perplexity"),
        "intervention_rate": ("steps intervened", "against steps intervened"),
        "touched_safe": ("safe texts touched", "against safe texts touched"),
    }
    charts = [_pareto(evaluation, judge, f"{name}-{key}", key, *texts) for key, texts in costs.items()]
    return [chart for chart in charts if chart is not None]


def _pareto(evaluation: Evaluation, judge: str, name: str, cost: str, label: str, against: str) -> Chart | None:
    rate, series = rate_name(evaluation), _series(evaluation, judge, cost)
    points = [point for one in series for point in one.points]
    if len(points) < 2:
        return None
    reach = [bound for point in points for bound in (point.x, *(point.x_interval or ()))]

    def finish(axes: "Axes") -> None:
        if cost != "perplexity_ratio":
            axes.update_datalim([(0, 0)])
            axes.autoscale_view()
            percents(axes.xaxis)
        elif max(reach) > 4 * min(reach):
            logarithmic(axes, "x", f"{TIMES}{{x:g}}")
        else:
            axes.xaxis.set_major_formatter(f"{TIMES}{{x:.6g}}")
        axes.set_ylim(bottom=0)
        percents(axes.yaxis)

    return Chart(
        name=name,
        title=f"{rate[0].upper()}{rate[1:]} {against}",
        note=f"Judge: {judge}",
        x=label,
        y="rate",
        series=[one for one in series if one.points or one.rule is not None],
        finish=finish,
    )


def _series(evaluation: Evaluation, judge: str, cost: str) -> list[Series]:
    """One series for each method, or for each number of candidates of a method that has a threshold."""
    groups: dict[tuple[str, int | None], list[Run]] = {}
    for run in evaluation["runs"]:
        groups.setdefault((run["method"], run["num_candidates"] if run["threshold"] else None), []).append(run)
    main, seen, found = main_run(evaluation), dict.fromkeys(_METHODS, 0), []
    for (method, candidates), runs in groups.items():
        title, colours, line, marker = _METHODS[method]
        if len(runs) == 1:
            title = runs[0]["name"]
        elif candidates:
            title = f"{title}, K={candidates}"
        ordered = sorted(runs, key=lambda run: run["threshold"] or run["num_candidates"] or 0)
        points = [
            _point(run, judge, cost, _label(run, len(runs) > 1), run is main)
            for run in ordered
            if _has(run, judge, cost)
        ]
        rule = runs[0]["judges"][judge]["rate"] if (base := method == "base") else None
        colour = colours[seen[method] % len(colours)]
        found.append(Series(title, points, colour, line if base or len(runs) > 1 else "", marker, rule=rule))
        seen[method] += 1
    return found


def _has(run: Run, judge: str, cost: str) -> bool:
    return run.get(cost) is not None and judge in run["judges"]


def _point(run: Run, judge: str, cost: str, label: str, ring: bool) -> Point:
    judged, interval = run["judges"][judge], run.get(f"{cost}_interval")
    text = factor if cost == "perplexity_ratio" else percent
    about = {"perplexity_ratio": "perplexity", "intervention_rate": "intervened"}.get(cost, "safe texts touched")
    return Point(
        x=run[cost],
        y=judged["rate"],
        tip=f"{run['name']}\nrate {percent(judged['rate'], judged['rate_interval'])}\n"
        f"{about} {text(run[cost], interval)}",
        label=label,
        x_interval=interval,
        y_interval=judged["rate_interval"],
        ring=ring,
    )


def _label(run: Run, several: bool) -> str:
    """What stands beside a run: its method, or what sets it apart in its method; no text of the document."""
    title, count = _METHODS[run["method"]][0], run["num_candidates"]
    if several and run["threshold"]:
        return f"{run['alpha']:g}" if run.get("alpha") else f"c={run['threshold']:.3g}"
    if not isinstance(count, int):
        return "" if several else title
    if run["method"] == "best_of_n":
        return f"N={count}" if several else f"best of {count}"
    return f"K={count}" if several else f"{title} K={count}"


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
    series = _curves(calibration, name)
    curve = sorted(calibration["curve"], key=lambda entry: float(entry["alpha"]))
    barred = [entry["alpha"] for entry in takewhile(lambda entry: entry["threshold"] is None, curve)]
    bottom = min([0.0, *(point.y for one in series for point in one.points)])
    if barred:
        none = [Point(each, bottom, f"alpha {each:g}\nno {name} keeps the promise", radius=3.5) for each in barred]
        series.append(Series("nothing can be promised", none, "s-words", "", "P"))
    if own:
        series.append(reference(f"own threshold {own:.4g}", own))

    def finish(axes: "Axes") -> None:
        logarithmic(axes, "x", "{x:g}")
        axes.set_ylim(bottom=bottom)
        if barred:
            left = axes.get_xlim()[0]
            axes.axvspan(left, barred[-1], color=COLOURS["barred"], linewidth=0)
            axes.set_xlim(left=left)

    title = f"{name[0].upper()}{name[1:]} for each alpha"
    note = "Each is valid for every larger alpha too: hence the steps."
    return Chart("calibration", title, note, "alpha", name, series, finish, keyed=len(series) > 1)


def _curves(calibration: Mapping[str, Any], name: str) -> list[Series]:
    """Of all texts, and of each group, as far as something can be promised."""
    groups = calibration.get("groups") or {}
    curves = {"all texts" if groups else name: calibration["curve"]}
    curves |= {group: held["curve"] for group, held in groups.items()}
    found = []
    for (each, curve), colour in zip(curves.items(), cycle(_FILTER)):
        kept = sorted((entry["alpha"], entry["threshold"]) for entry in curve if entry["threshold"] is not None)
        points = [Point(alpha, c, f"alpha {alpha:g}\n{name} {c:.4g}", radius=3) for alpha, c in kept]
        found += [Series(each, points, colour, steps=True)] if points else []
    return found


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
    judge = judge_title(evaluation, reliability_judge(evaluation))
    return Chart(
        name="reliability",
        title="Reliability of values",
        note=f"Worst value of each text without steering; judge: {judge}. On the diagonal a value is a probability. "
        "Larger points hold more texts.",
        x="mean value",
        y="measured rate",
        series=[Series("range of values", points)],
        finish=_diagonal,
    )


def _diagonal(axes: "Axes") -> None:
    axes.set(xlim=(0, None), ylim=(0, None))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.axline((0, 0), slope=1, color=COLOURS["soft"], linestyle="--", linewidth=1)


def coverage_charts(evaluation: Evaluation) -> list[Chart]:
    """Accuracy of the answers that are given, and tokens saved, against the share of prompts that get one."""
    entries = coverage_curve(evaluation)
    if len(entries) < 2:
        return []
    accuracy = [Point(entry["coverage"], entry["accuracy"], _coverage_tip(entry)) for entry in entries]
    every = [reference("every prompt answered", entry["accuracy"]) for entry in entries if entry["coverage"] == 1]
    series = [Series("accuracy", accuracy), *every]
    band = [(entry["coverage"], *entry["accuracy_interval"]) for entry in entries if entry["accuracy_interval"]]

    def finish(axes: "Axes") -> None:
        if band:
            x, low, high = zip(*band, strict=True)
            axes.fill_between(x, low, high, color=COLOURS["s-filter0"], alpha=0.15, linewidth=0)
        _coverage(axes)

    share, note = "coverage: share of prompts answered", "The band is the 95 % interval."
    charts = [Chart("coverage", "Accuracy of what is answered", note, share, "accuracy", series, finish, keyed=True)]
    saved = [
        Point(entry["coverage"], entry["tokens_saved"], _coverage_tip(entry))
        for entry in entries
        if entry["tokens_saved"] is not None
    ]
    if len(saved) > 1:
        title, note = "Tokens saved by stopping early", "Against answering every prompt."
        series = [Series("tokens saved", saved, "s-args")]
        charts.append(Chart("saved", title, note, share, "tokens saved", series, _coverage))
    return charts


def _coverage(axes: "Axes") -> None:
    axes.set(xlim=(0, 1), ylim=(0, None))
    percents(axes.xaxis, axes.yaxis)


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

    def finish(axes: "Axes") -> None:
        axes.set_yscale("logit")
        axes.minorticks_off()
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter("{x:.3g}")
        height, right = _with_odds(threshold), axes.get_yaxis_transform()
        axes.axhline(height, color=COLOURS["soft"], linestyle="--", linewidth=1)
        axes.annotate(f"{threshold:.3g}", (1, height), (4, 0), right, "offset points", va="center_baseline")
        axes.set_xlim(1, max(len(trace.base), len(trace.steered), 2))
        axes.locator_params(axis="x", integer=True)
        ticks = [step for step in axes.get_xticks() if 2 < step <= axes.get_xlim()[1]]
        axes.set_xticks([1, *ticks], ["token 1", *map("{:g}".format, ticks)])

    series = [Series("base", _path(trace.base), "ink"), Series("steered", _path(trace.steered))]
    return Chart(name, "Values", "", "", "value", series, finish, STRIP)


def _path(tokens: Sequence[TokenTrace]) -> list[Point]:
    return [
        Point(step, _with_odds(token.value), radius=4 * token.intervened) for step, token in enumerate(tokens, start=1)
    ]


def _with_odds(value: float) -> float:
    """The value, or where its odds are beyond 1 to 100,000, the nearest one that has those."""
    return min(max(value, 1e-5), 1 - 1e-5)
