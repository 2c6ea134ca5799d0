"""An evaluation and a calibration as Markdown and as `model-index`, for the card of a head."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from hf_value_steer.cards.document import (
    COLUMNS,
    MISSING,
    Evaluation,
    cell,
    change,
    check_evaluation,
    coverage_curve,
    flat,
    is_measured,
    judge_title,
    judges,
    main_coverage,
    main_run,
    number,
    options,
    percent,
    rate_name,
    setting,
    verdicts,
)
from hf_value_steer.files.markup import code, plain, table


_ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # shown of a longer curve


def results_markdown(evaluation: Evaluation) -> str:
    """Tables of an evaluation: every run by every judge, what else was measured of it, and accuracy at coverage.

    Args:
        evaluation (`dict`): what is in `evaluation.json`.

    Raises:
        ValueError: if this is no evaluation document.
    """
    check_evaluation(evaluation)
    parts = [_runs(evaluation)]
    curve = coverage_curve(evaluation)
    if curve:
        parts.append(_coverage(curve))
    sampling = code(options(evaluation["sampling"]))
    said = [*_discrimination(evaluation), f"{plain(setting(evaluation))} Sampling: {sampling}."]
    return "\n\n".join([*parts, *said]) + "\n"


def _discrimination(evaluation: Evaluation) -> list[str]:
    """How well values tell texts apart, if it was measured."""
    bad, good = verdicts(evaluation)
    told = []
    for name, each in (evaluation.get("discrimination") or {}).items():
        if each["auroc"] is not None:
            of = f"above {each['lower']:.3f}; {each['positive']} {bad}, {each['negative']} {good}"
            told.append(f"{plain(judge_title(evaluation, name))} {each['auroc']:.3f} ({of})")
    if not told:
        return []
    return [f"AUROC of a text's worst value, without steering (one-sided 95 % bound), by judge: {'; '.join(told)}."]


def _runs(evaluation: Evaluation) -> str:
    names, main = judges(evaluation), main_run(evaluation)
    keys = [key for key in COLUMNS if is_measured(evaluation, key)]
    rated = (plain(f"{rate_name(evaluation)}, {judge_title(evaluation, name)}") for name in names)
    head = ["run", *rated, *(COLUMNS[key][0] for key in keys)]
    rows: list[list[str]] = []
    last: list[list[str]] = []
    for run, quoted in [(run, run is main) for run in evaluation["runs"]]:
        judged = [run["judges"].get(name) for name in names]
        rates = [percent(one["rate"], one["rate_interval"]) if one else MISSING for one in judged]
        name = plain(run["name"])
        rows.append([f"**{name}**" if quoted else name, *rates, *(cell(run, key) for key in keys)])
        if quoted:
            changes = [change(one) if one else MISSING for one in judged]
            last = [[f"change by {name}", *changes, *[""] * len(keys)]]
    return table(head, rows + last)


def _coverage(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            percent(entry["coverage"]),
            percent(entry["accuracy"], entry["accuracy_interval"]),
            number(entry["threshold"], 4),
            percent(entry["tokens_saved"]),
        ]
        for entry in entries
    ]
    return table(["prompts answered", "accuracy of the answers", "threshold", "tokens saved"], rows)


def calibration_markdown(calibration: Mapping[str, Any]) -> str:
    """The guarantee of a calibration, its thresholds, and what it holds for.

    Args:
        calibration (`dict`): what is in `calibration.json`; its scores are not looked at.
    """
    name = "least growth of the log odds" if calibration["mode"] == "martingale" else "threshold"
    held: dict[str, Any] = {"all texts": calibration, **(calibration.get("groups") or {})}
    head = ["alpha", *(f"{name}, {plain(group)}" if len(held) > 1 else name for group in held)]
    curves = [{entry["alpha"]: entry["threshold"] for entry in each["curve"]} for each in held.values()]
    alphas = sorted(curves[0])
    shown = [alpha for alpha in alphas if len(alphas) > len(_ALPHAS) and alpha in _ALPHAS] or alphas
    rows = [[f"{alpha:g}", *(_threshold(curve.get(alpha)) for curve in curves)] for alpha in shown]
    parts = [plain(calibration["guarantee"]), table(head, rows)]
    finite = [alpha for alpha in shown if curves[0][alpha] is not None]
    if finite:
        parts.append(f"A configuration with `alpha={finite[0]:g}` takes its threshold from here.")
    known = flat({key: calibration.get(key) for key in ("mode", "n", "delta", "kernel", "backend", "data")})
    known |= {"sampling": options(calibration["sampling"])} if calibration.get("sampling") else {}
    parts.append("Calibrated with: " + "; ".join(f"{plain(key)} {code(text)}" for key, text in known.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _threshold(threshold: float | None) -> str:
    return "none keeps the promise" if threshold is None else f"{threshold:.4g}"


def model_index(evaluation: Evaluation) -> list[EvalResult]:
    """The metrics of the main run, or of abstention, for the metadata of a card.

    Raises:
        ValueError: if this is no evaluation document.
    """
    check_evaluation(evaluation)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="prompts",
            dataset_name=f"{evaluation['prompts']} prompts, {evaluation['generations']} generations",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args={key: text for key, text in details.items() if text is not None} or None,
        )
        for kind, name, value, details in [*_main_metrics(evaluation), *_coverage_metrics(evaluation)]
        if value is not None
    ]


def _main_metrics(evaluation: Evaluation) -> list[tuple[str, str, float | None, dict[str, Any]]]:
    main, rate = main_run(evaluation), rate_name(evaluation)
    if main is None:
        return []
    about = {"run": main["name"]}
    found: list[tuple[str, str, float | None, dict[str, Any]]] = []
    for name in judges(evaluation):
        base, judged = evaluation["runs"][0]["judges"].get(name), main["judges"].get(name)
        if base and judged:
            details = {**about, "interval": judged["rate_interval"], "base": base["rate"]}
            found.append(("rate", f"{rate}, {judge_title(evaluation, name)}", judged["rate"], details))
    costs = ("perplexity_ratio", "intervention_rate", "touched_safe", "intervened_on_safe")
    for key in (each for each in costs if is_measured(evaluation, each)):
        found.append((key, COLUMNS[key][0], main.get(key), {**about, "interval": main.get(f"{key}_interval")}))
    return found


def _coverage_metrics(evaluation: Evaluation) -> list[tuple[str, str, float | None, dict[str, Any]]]:
    return [
        (
            "selective_accuracy",
            f"accuracy at {100 * entry['coverage']:g} % coverage",
            entry["accuracy"],
            {"interval": entry["accuracy_interval"], "threshold": entry["threshold"]},
        )
        for entry in main_coverage(evaluation)
    ]
