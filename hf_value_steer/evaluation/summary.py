"""What the head of a report and its table of runs say."""

from collections.abc import Iterator, Mapping
from typing import Any

from hf_value_steer.cards.document import (
    COLUMNS,
    Evaluation,
    Run,
    cell,
    change,
    is_measured,
    judge_title,
    judges,
    main_coverage,
    main_run,
    percent,
    rate_name,
    setting,
    verdicts,
)


_METHODS = {
    "filter": "Value-filtered decoding",
    "rollback": "Value-filtered decoding that goes back",
    "soft": "Soft value-filtered decoding that goes back",
    "abstain": "Dynamic abstention",
}
_IN_TILES = ("perplexity_ratio", "intervention_rate", "touched_safe", "intervened_on_safe", "abstention_rate")
Cell = tuple[str, str, str]  # a number, its interval, and a CSS class


def title(evaluation: Evaluation) -> str:
    """The heading of the page."""
    return f"Value head: {evaluation['head']['attribute'] or 'unnamed attribute'}"


def lead(evaluation: Evaluation) -> str:
    """By what it was steered, and what it was measured on."""
    main = main_run(evaluation)
    if main is None:
        return setting(evaluation)
    candidates = f" with {main['num_candidates']} candidates" if main.get("num_candidates") else ""
    threshold = "" if main["threshold"] is None else f" at threshold {main['threshold']:.4g}"
    return f"{_METHODS[main['method']]}{candidates}{threshold}. {setting(evaluation)}"


def tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """The main numbers: name, number and interval of each."""
    base, main = evaluation["runs"][0], main_run(evaluation)
    held = [] if main is None else [*_judge_tiles(evaluation, base, main), *_run_tiles(evaluation, main)]
    held += _discrimination_tiles(evaluation)
    return [(name, _whole(text), _whole(note)) for name, text, note in [*held, *_coverage_tiles(evaluation)]]


def _judge_tiles(evaluation: Evaluation, base: Run, main: Run) -> list[tuple[str, str, str]]:
    return [
        (
            f"{rate_name(evaluation)}, {judge_title(evaluation, name)}",
            f"{percent(base['judges'][name]['rate'])} → {percent(main['judges'][name]['rate'])}",
            change(main["judges"][name]),
        )
        for name in judges(evaluation)
        if name in base["judges"] and name in main["judges"]
    ]


def _run_tiles(evaluation: Evaluation, main: Run) -> list[tuple[str, str, str]]:
    return [
        (COLUMNS[key][0], *_split(cell(main, key)))
        for key in _IN_TILES
        if is_measured(evaluation, key)
        and main.get(key) is not None
        and (key != "abstention_rate" or main["method"] == "abstain")
    ]


def _discrimination_tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """How well values tell the texts of the base run apart, by each judge that found some of either kind."""
    found, (bad, good) = evaluation.get("discrimination") or {}, verdicts(evaluation)
    return [
        (
            f"AUROC of the worst value, {judge_title(evaluation, name)}",
            f"{each['auroc']:.3f}",
            f"above {each['lower']:.3f}; {each['positive']} {bad}, {each['negative']} {good} texts",
        )
        for name, each in found.items()
        if each["auroc"] is not None
    ]


def _coverage_tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    entries = main_coverage(evaluation)
    if not entries:
        return []
    first, full = entries[0], entries[-1]
    shown, note = _split(percent(first["accuracy"], first["accuracy_interval"]))
    if full is not first:
        shown = f"{percent(full['accuracy'])} → {shown}"
    found = [(f"accuracy at {100 * first['coverage']:g} % coverage", shown, note)]
    if first["tokens_saved"] is not None:
        found.append(("tokens saved there", percent(first["tokens_saved"]), ""))
    return found


def columns(evaluation: Evaluation) -> list[str]:
    """Which of `COLUMNS` a run has a number in."""
    return [key for key in COLUMNS if is_measured(evaluation, key)]


def rows(evaluation: Evaluation) -> Iterator[tuple[Run, list[Cell]]]:
    """Each run with two cells for each judge, and one for each of [`columns`]."""
    names, keys = judges(evaluation), columns(evaluation)
    for run in evaluation["runs"]:
        cells = [each for name in names for each in _judge_cells(run, run["judges"].get(name))]
        yield run, [*cells, *(_cell(cell(run, key)) for key in keys)]


def _judge_cells(run: Run, judged: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    if judged is None:
        return _cell(""), _cell("")
    rate, interval = _cell(percent(judged["rate"], judged["rate_interval"])), judged["difference_interval"]
    if run["method"] == "base":
        return rate, _cell("")
    unsure = interval is not None and interval[0] <= 0 <= interval[1]
    return rate, _cell(change(judged), "unsure" if unsure else "")


def _cell(text: str, kind: str = "") -> Cell:
    shown, interval = _split(text)
    return _whole(shown), _whole(interval), kind


def _split(text: str) -> tuple[str, str]:
    """A number and its interval."""
    shown, bracket, interval = text.partition(" [")
    return shown, f"[{interval}" if bracket else ""


def _whole(text: str) -> str:
    """Text that breaks only after an arrow, and before the interval of a number."""
    return text.replace(" ", "\u00a0").replace("→\u00a0", "→ ").replace("\u00a0[", " [")
