"""The report of an evaluation: one self-contained page of HTML, SVG and CSS, without script and without requests."""

from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from hf_value_steer.cards.document import Evaluation, check_evaluation, flat, judge_title, judges, main_run, options
from hf_value_steer.evaluation import figures, summary
from hf_value_steer.evaluation.charts import Chart, Series, figure, legend
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace, TraceCards, facts, is_touched, packaged


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
    parts = {
        "Trade-off": _tradeoff(evaluation),
        "Runs": summary.runs_table(evaluation),
        "Calibration": _calibration(evaluation),
        "Abstention": _grid(figures.coverage_charts(evaluation)),
        "Examples": _examples(evaluation),
    }
    held = {name: body for name, body in parts.items() if body}
    return Template(packaged("report.html")).substitute(
        style=packaged("page.css") + packaged("chart.css"),
        chosen=_chosen(len(evaluation["judges"])),
        title=escape(summary.title(evaluation)),
        lead=summary.lead(evaluation),
        tiles=summary.tiles(evaluation),
        links="".join(f'<a href="#{name.lower()}">{name}</a>' for name in held),
        parts="\n".join(_part(name, body) for name, body in held.items()),
        about=facts(_about(evaluation)),
    )


def _part(name: str, body: str) -> str:
    key = name.lower()
    return f'<section class="part" id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{name}</h2>{body}</section>'


def _grid(charts: Sequence[Chart]) -> str:
    return f'<div class="grid">{"".join(map(figure, charts))}</div>' if charts else ""


def _chosen(count: int) -> str:
    """Hides the charts of the judges that are not chosen."""
    return "\n".join(
        f"body:has(#judge-{index}:checked) .judge:not(.j{index}) {{ display: none; }}" for index in range(count)
    )


def _tradeoff(evaluation: Evaluation) -> str:
    names = judges(evaluation)
    charts = [figures.pareto_charts(evaluation, name, f"pareto-{index}") for index, name in enumerate(names)]
    if not any(charts):
        return ""
    options = "".join(
        f'<label><input type="radio" name="judge" id="judge-{index}"{"" if index else " checked"}>'
        f"{escape(judge_title(evaluation, name))}</label>"
        for index, name in enumerate(names)
    )
    choice = f'<fieldset class="bar"><legend>judge</legend>{options}</fieldset>' if len(names) > 1 else ""
    series: dict[str, Series] = {one.name: one for held in charts for chart in held for one in chart.series}
    shown = "".join(f'<div class="judge j{index}">{_grid(held)}</div>' for index, held in enumerate(charts))
    return f"{choice}{shown}{legend(list(series.values()))}"


def _calibration(evaluation: Evaluation) -> str:
    charts = [figures.calibration_chart(evaluation), figures.reliability_chart(evaluation)]
    calibration = evaluation["calibration"]
    said = ""
    if calibration:
        delta = calibration["delta"]
        known = {
            "mode": calibration["mode"],
            "texts": f"{calibration['n']:,}",
            "confidence": None if delta is None else f"{100 * (1 - delta):g} %",
            "kernel": calibration.get("kernel"),
            "backend": calibration.get("backend"),
            "sampling": options(calibration.get("sampling") or {}),
        }
        pairs = {name: str(text) for name, text in known.items() if text}
        said = f'<p class="promise">{escape(calibration["guarantee"])}</p><dl class="run">{facts(pairs)}</dl>'
    return said + _grid([chart for chart in charts if chart is not None])


def _about(evaluation: Evaluation) -> dict[str, str]:
    head = {"backbone fingerprint": evaluation["head"]["backbone_fingerprint"], "seed": evaluation["seed"]}
    return flat({**head, "sampling": options(evaluation["sampling"]), **evaluation["environment"]})


def _examples(evaluation: Evaluation) -> str:
    main = main_run(evaluation)
    threshold = evaluation["head"]["threshold"] if main is None else main["threshold"]
    if not evaluation["examples"] or threshold is None:
        return ""
    traces = [_trace(example) for example in evaluation["examples"]]
    masked = [_trace(example) for example in evaluation.get("masked_examples") or evaluation["examples"]]
    if list(map(_shape, traces)) != list(map(_shape, masked)):
        raise ValueError("`masked_examples` has to be `examples` token for token, with words hidden in place.")
    cards = TraceCards(threshold, evaluation["head"]["polarity"], heading=3)
    shown = "".join(
        cards.card(number, trace, hidden, figure(figures.trajectory_chart(f"path-{number}", trace, threshold)))
        for number, (trace, hidden) in enumerate(zip(traces, masked, strict=True), start=1)
    )
    touched = f"{sum(map(is_touched, traces))} of {len(traces)}"
    reveal = '<label><input type="checkbox" id="reveal"> show masked words</label>'
    return (
        f'<div class="bar"><div class="legend" role="group" aria-label="colours of values">{cards.legend()}</div>'
        f'<label><input type="checkbox" id="only"> only prompts with interventions ({touched})</label>'
        f"{reveal if evaluation.get('masked_examples') else ''}</div>{shown}"
        '<p class="aside">Colour is the value of a token relative to the threshold, in steps of four times the odds. '
        'A <span class="swap">framed</span> token took the place of a draw that was not acceptable. Point at a token, '
        "tap it, or move to it with Tab to see its value and its candidates in the order of drawing: ✕ not "
        "acceptable, ✓ committed, others not needed. In the charts the dashed line is the threshold, and the scale is "
        "that of the odds.</p>"
    )


def _trace(example: Mapping[str, Any]) -> PromptTrace:
    return PromptTrace(
        example["prompt"], *([_token(token) for token in example[side]] for side in ("base", "steered"))
    )


def _token(token: Mapping[str, Any]) -> TokenTrace:
    candidates = tuple((text, value) for text, value in token["candidates"])
    return TokenTrace(token["text"], token["value"], token["intervened"], candidates)


def _shape(trace: PromptTrace) -> list[list[tuple[float, int, int]]]:
    """What masking does not change."""
    sides = (trace.base, trace.steered)
    return [[(token.value, len(token.text), len(token.candidates)) for token in side] for side in sides]
