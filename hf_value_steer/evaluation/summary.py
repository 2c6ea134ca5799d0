"""The head of a report and its table of runs."""

from collections.abc import Mapping, Sequence
from html import escape
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
)


_METHODS = {"filter": "Value-filtered decoding", "abstain": "Dynamic abstention"}
_IN_TILES = ("perplexity_ratio", "intervention_rate", "intervened_on_safe", "abstention_rate")


def title(evaluation: Evaluation) -> str:
    """The heading of the page."""
    return f"Value head: {evaluation['head']['attribute'] or 'unnamed attribute'}"


def lead(evaluation: Evaluation) -> str:
    """What was steered, by what, and what it was measured on."""
    head, main = evaluation["head"], main_run(evaluation)
    said = f"For <code>{escape(str(head['backbone'] or 'an unnamed backbone'))}</code>; "
    said += f"a high value is <b>{escape(head['polarity'])}</b>."
    method = ""
    if main is not None:
        candidates = f" with {main['num_candidates']} candidates" if main.get("num_candidates") else ""
        threshold = "" if main["threshold"] is None else f" at threshold {main['threshold']:.4g}"
        method = f" {_METHODS[main['method']]}{candidates}{threshold}."
    return f"<p>{said}{escape(f'{method} {setting(evaluation)}')}</p>"


def tiles(evaluation: Evaluation) -> str:
    """The main numbers, each with its interval."""
    base, main = evaluation["runs"][0], main_run(evaluation)
    held = [] if main is None else [*_judge_tiles(evaluation, base, main), *_run_tiles(main)]
    held += _coverage_tiles(evaluation)
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_whole(text)}<small>{_whole(note)}</small></dd></div>"
        for name, text, note in held
    )


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


def _run_tiles(main: Run) -> list[tuple[str, str, str]]:
    return [
        (COLUMNS[key][0], *_split(cell(main, key)))
        for key in _IN_TILES
        if main.get(key) is not None and (key != "abstention_rate" or main["method"] == "abstain")
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


def runs_table(evaluation: Evaluation) -> str:
    """A row for each run; columns in which nothing was measured are left out."""
    names, main = judges(evaluation), main_run(evaluation)
    keys = [key for key in COLUMNS if is_measured(evaluation, key)]
    upper = "".join(f'<th colspan="2" scope="colgroup">{escape(judge_title(evaluation, name))}</th>' for name in names)
    upper += "".join(f'<th rowspan="2" scope="col">{COLUMNS[key][0]}</th>' for key in keys)
    lower = '<th scope="col">rate</th><th scope="col">change</th>' * len(names)
    rows = "".join(_row(run, names, keys, "main" if run is main else "") for run in evaluation["runs"])
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table of runs"><table><thead>'
        f'<tr><th rowspan="2" scope="col">run</th>{upper}</tr><tr>{lower}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        '<p class="aside">Rates and changes are those of each judge, with 95 % intervals; changes are relative to '
        "base, and grey where the interval of the difference holds 0.</p>"
    )


def _row(run: Run, names: Sequence[str], keys: Sequence[str], kind: str) -> str:
    cells = "".join(_judge_cells(run, run["judges"].get(name)) for name in names)
    cells += "".join(_cell(cell(run, key)) for key in keys)
    return f'<tr class="{kind}"><th scope="row">{escape(run["name"])}</th>{cells}</tr>'


def _judge_cells(run: Run, judged: Mapping[str, Any] | None) -> str:
    if judged is None:
        return _cell("") + _cell("")
    if run["method"] == "base":
        return _cell(percent(judged["rate"], judged["rate_interval"])) + _cell("")
    interval = judged["difference_interval"]
    unsure = interval is not None and interval[0] <= 0 <= interval[1]
    return _cell(percent(judged["rate"], judged["rate_interval"])) + _cell(change(judged), "unsure" if unsure else "")


def _cell(text: str, kind: str = "") -> str:
    shown, interval = _split(text)
    return f'<td class="{kind}">{_whole(shown)}<small>{_whole(interval)}</small></td>'


def _split(text: str) -> tuple[str, str]:
    """A number and its interval."""
    shown, bracket, interval = text.partition(" [")
    return shown, f"[{interval}" if bracket else ""


def _whole(text: str) -> str:
    """Text as HTML that breaks only after an arrow, and before the interval of a number."""
    return escape(text).replace(" ", "\u00a0").replace("→\u00a0", "→ ").replace("\u00a0[", " [")
