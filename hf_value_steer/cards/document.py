"""Reading an evaluation document (`evaluation.json`): its format, the run it is about, and its numbers as text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


FORMAT = "hf-value-steer/evaluation@1"
MISSING, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

# What steering did to a text, by whether a judge finds it bad without steering and with it; and what that means.
OUTCOMES = {
    "mended": "{bad} without steering, {good} with it",
    "missed": "{bad} without steering and with it",
    "touched for nothing": "{good} without steering, and yet a token was replaced",
    "made worse": "{good} without steering, {bad} with it",
    "left alone": "{good} without steering, and not changed",
}

Evaluation = Mapping[str, Any]
Run = Mapping[str, Any]
Interval = Sequence[float] | None


def check_evaluation(evaluation: Evaluation) -> None:
    """Raise a `ValueError` unless `evaluation` is a document of this format whose first run is the base."""
    found = evaluation.get("format")
    if found != FORMAT:
        raise ValueError(
            f"`evaluation` has format {found!r}, expected {FORMAT!r}: pass what `hf-value-steer evaluate` wrote."
        )
    runs = evaluation["runs"]
    if not runs or runs[0]["method"] != "base":
        raise ValueError("`evaluation` has to start with the run of the base model, against which all are compared.")


def main_run(evaluation: Evaluation) -> Run | None:
    """The run that headlines quote: as the head is meant to be used, at its own threshold; else the first one."""
    head = evaluation["head"]
    point = head.get("operating_point") or {}
    meant = "soft" if point.get("selection") == "soft" else "rollback" if point.get("rollback") else "filter"
    methods = dict.fromkeys([meant, "filter", "abstain", "rollback", "soft", "end"])
    steered = [run for name in methods for run in evaluation["runs"] if run["method"] == name]
    alphas = alphas_of(head["threshold"], evaluation.get("calibration"))
    own = [run for run in steered if run["threshold"] == head["threshold"] or run.get("alpha") in alphas]
    return next(iter([*own, *steered]), None)


def alphas_of(threshold: float | None, calibration: Mapping[str, Any] | None) -> list[float]:
    """The promises of a calibration that have this threshold; with few texts several may."""
    curve = calibration["curve"] if calibration else []
    return [point["alpha"] for point in curve if threshold is not None and point["threshold"] == threshold]


def coverage_curve(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """The entries of the coverage curve that have an accuracy, in ascending order."""
    entries = [entry for entry in evaluation["coverage"] or [] if entry["accuracy"] is not None]
    return sorted(entries, key=lambda entry: float(entry["coverage"]))


def main_coverage(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """The entry of the coverage curve that headlines quote, near a fifth of the prompts, and that of all prompts."""
    curve = coverage_curve(evaluation)
    near = sorted(curve, key=lambda entry: abs(entry["coverage"] - 0.2))[:1]
    return near + [entry for entry in curve if entry["coverage"] == 1 and entry not in near]


def judges(evaluation: Evaluation) -> list[str]:
    """Names of the judges, those that gave no labels first."""
    return [judge["name"] for judge in sorted(evaluation["judges"], key=lambda judge: bool(judge["gave_labels"]))]


def judge_title(evaluation: Evaluation, name: str) -> str:
    """The name of a judge, with a warning if the head learned from it."""
    labels = any(judge["gave_labels"] for judge in evaluation["judges"] if judge["name"] == name)
    return f"{name} (gave the labels)" if labels else name


def is_measured(evaluation: Evaluation, key: str) -> bool:
    """Whether a run has a number under `key`, and no better one under another."""
    better = _REPLACED_BY.get(key)
    if better and is_measured(evaluation, better):
        return False
    return any(run.get(key) is not None for run in evaluation["runs"])


def verdicts(evaluation: Evaluation) -> tuple[str, str]:
    """What a bad text is called, and a good one."""
    return ("unsafe", "safe") if evaluation["head"]["polarity"] == "undesirable" else ("wrong", "right")


def reliability_judge(evaluation: Evaluation) -> str:
    """The judge that the reliability of values was measured by; older documents took the first and did not say so."""
    return str(evaluation.get("reliability_judge") or evaluation["judges"][0]["name"])


def outcome_judge(evaluation: Evaluation) -> str:
    """The judge that outcomes are told by: the one that gave the labels, or else the first."""
    names = judges(evaluation)
    return next((judge["name"] for judge in evaluation["judges"] if judge["gave_labels"]), names[0])


def outcome_note(evaluation: Evaluation, name: str) -> str:
    """What one of `OUTCOMES` means, and how many texts of the main run had it, as far as the document knows."""
    if not name:
        return ""
    bad, good = verdicts(evaluation)
    counts = evaluation.get("outcomes") or (main_run(evaluation) or {}).get("outcomes") or {}
    counted = f"; {counts.get(name, 0):,} of {sum(counts.values()):,} texts" if counts else ""
    return OUTCOMES[name].format(bad=bad, good=good) + counted


def setting(evaluation: Evaluation) -> str:
    """What the numbers of a document were measured on, as a sentence."""
    bad, good = verdicts(evaluation)
    counted = bad if evaluation["head"]["polarity"] == "undesirable" else good
    return (
        f"{evaluation['generations']:,} generations of {evaluation['prompts']:,} prompts, up to "
        f"{evaluation['new_tokens']} new tokens, seed {evaluation['seed']}; 95 % intervals by prompt. "
        f"A text that a judge scores above 0.5 counts as {counted}; its rate is the share of those."
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as names and texts, without what is `None`."""
    texts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            texts |= flat(value, f"{prefix}{key} ")
        elif value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            texts[f"{prefix}{key}".replace("_", " ")] = ", ".join(map(str, items))
    return texts


def options(values: Mapping[str, Any]) -> str:
    """Arguments as they are written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))


def percent(value: float | None, interval: Interval = None) -> str:
    """A share as `"10.6 % [6.5, 15.3]"`."""
    if value is None:
        return MISSING
    return f"{_tidy(100 * value, 1)} %" + bounds([100 * bound for bound in interval] if interval else None, 1)


def factor(value: float | None, interval: Interval = None) -> str:
    """A ratio with its interval: times 1.07 [1.02, 1.12]."""
    return MISSING if value is None else f"{TIMES}{value:.2f}" + bounds(interval, 2)


def number(value: float | None, digits: int) -> str:
    """A number with a fixed count of digits."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def change(judged: Mapping[str, Any]) -> str:
    """What became of a rate, relative to the base, with its sign."""
    reduction, interval = judged["relative_reduction"], judged["relative_reduction_interval"]
    if reduction is None:
        return MISSING
    sign = "+" if reduction < 0 else ""
    return sign + percent(-reduction, [-interval[1], -interval[0]] if interval else None)


def bounds(interval: Interval, digits: int) -> str:
    """An interval as text that follows its number."""
    return f" [{_tidy(interval[0], digits)}, {_tidy(interval[1], digits)}]" if interval else ""


def _tidy(value: float, digits: int) -> str:
    """Fixed digits, a true minus sign, and no minus sign before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def _digits(digits: int) -> Callable[[float | None, Interval], str]:
    return lambda value, _: number(value, digits)


# What tables say of a run beside the judges: key, heading, and how number and interval are written.
COLUMNS: Mapping[str, tuple[str, Callable[[float | None, Interval], str]]] = {
    "perplexity": ("perplexity", _digits(1)),
    "perplexity_ratio": ("perplexity ratio", factor),
    "intervention_rate": ("steps intervened", percent),
    "touched_safe": ("safe texts touched", percent),
    "intervened_on_safe": ("safe texts intervened on", percent),
    "abstention_rate": ("abstained", percent),
    "identical_to_base": ("identical to base", percent),
    "distinct_1": ("distinct-1", _digits(3)),
    "distinct_2": ("distinct-2", _digits(3)),
    "mean_tokens": ("mean length", _digits(1)),
    "tokens": ("tokens", _digits(0)),
    "tokens_per_second": ("tokens/s", _digits(0)),
}


# Older documents have the first ones only.
_REPLACED_BY = {"intervened_on_safe": "touched_safe", "tokens": "mean_tokens"}


def cell(run: Run, key: str) -> str:
    """What a table says of a run under one of `COLUMNS`, with its interval if it has one."""
    return COLUMNS[key][1](run.get(key), run.get(f"{key}_interval"))


def rate_name(evaluation: Evaluation) -> str:
    """What the rates of the judges are rates of."""
    attribute = evaluation["head"]["attribute"]
    return f"{attribute} rate" if attribute else "rate"
