"""The model card of a head, generated from its config, its calibration and its evaluation."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.document import alphas_of, check_evaluation, main_run
from hf_value_steer.cards.parts import LIBRARY_NAME, LIMITS_PLACEHOLDER, Facts, filled, recorded, training_markdown
from hf_value_steer.cards.results import calibration_markdown, model_index, results_markdown
from hf_value_steer.files.markup import literal, plain, table
from hf_value_steer.files.upload import LIMITS, is_generated
from hf_value_steer.files.writing import write_new


NO_LIMITS = "Its author has added nothing to what follows."

# What a head reads, where its config or its evaluation does not say it.
_UNSAID = {"feature_layers": ["final"], "temporal": "none"}

_MARKER = re.compile(r"^<!-- /?limits", re.MULTILINE)


def head_card(
    facts: Facts,
    evaluation: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    limits: str | None = None,
    datasets: Sequence[str] | None = None,
    *,
    license: str | None = None,
    repo_id: str = "org/this-head",
) -> ModelCard:
    """A model card for a value head, generated from what is known of it.

    Args:
        facts: of the head.
        evaluation (`dict`, *optional*): what is in `evaluation.json`; gives "Results" and the `model-index`.
        calibration (`dict`, *optional*): what is in `calibration.json`; gives "Threshold and guarantee". By default
            the calibration that the head was loaded with.
        limits (`str`, *optional*): where the head fails, in Markdown, by a person. A placeholder stands for it.
        datasets (sequence of `str`, *optional*): Hub ids of what it was trained on.
        license (`str`, *optional*): identifier of the license, as on the Hub.
        repo_id (`str`): where the head can be loaded from.

    Raises:
        ValueError: if `evaluation` is no evaluation document, or is of another head, or `limits` has no text or holds
            the lines that stand around it in a card.
    """
    calibration = facts.calibration if calibration is None else calibration
    if evaluation is not None:
        check_same_head(facts.config, evaluation)
    _check_limits(limits)
    return filled(
        Path(__file__).with_suffix(".md"),
        _metadata(facts.config, evaluation, datasets, license),
        facts.config,
        **_described(facts, calibration),
        runtime=(runtime := _runtime(facts.config["polarity"], evaluation)),
        filters=runtime == "ValueFilterConfig",
        repo_id=literal(repo_id),
        results=results_markdown(evaluation) if evaluation else "",
        guarantee=calibration_markdown(calibration) if calibration else "",
        limits=(limits or LIMITS_PLACEHOLDER).strip(),
        known_limits=_known_limits(evaluation, calibration),
    )


def write_card(facts: Facts, folder: Path) -> None:
    """Write the generated card as `README.md`, unless the folder has one, which its author may have edited."""
    write_new(folder / "README.md", lambda: str(head_card(facts)))


def renew_card(
    facts: Facts,
    card: str | None,
    evaluation: Mapping[str, Any] | None = None,
    limits: str | None = None,
    datasets: Sequence[str] | None = None,
    *,
    license: str | None = None,
    repo_id: str = "org/this-head",
) -> str:
    """The text of a card generated anew, with what a person wrote into the old one.

    Args:
        card (`str`, *optional*): the old one. Its limits, license and data sets are kept where none are given. One
            that was not generated is returned as it is.
        facts, evaluation, limits, datasets, license, repo_id: as in [`head_card`].

    Raises:
        ValueError: as in [`head_card`], and if `limits` are given for a card that was not generated.
    """
    if evaluation is not None:
        check_same_head(facts.config, evaluation)
    if card is not None and not is_generated(card):
        if limits is not None:
            raise ValueError("`limits` have no place in a README.md that was not generated: write them there.")
        return card
    if card is not None:
        limits, data = limits or written_limits(card), ModelCard(card).data
        license, named = license or data.get("license"), data.get("datasets")
        datasets = datasets or ([named] if isinstance(named, str) else named)
    return str(head_card(facts, evaluation, None, limits, datasets, license=license, repo_id=repo_id))


def lacks_limits(card: str) -> bool:
    """Whether nobody has written into the limits section of a card, generated or not."""
    unwritten = "## Limits" not in card or "is for its author to add here" in " ".join(card.split())
    return written_limits(card) is None if is_generated(card) else unwritten


def written_limits(card: str) -> str | None:
    """What a person wrote into the limits section of a generated card; `None` if that is the placeholder."""
    found = LIMITS.search(card)
    text = found.group(1).strip() if found else ""
    return None if text in ("", LIMITS_PLACEHOLDER, NO_LIMITS) else text


def check_same_head(config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless `evaluation` is an evaluation document of the head with this config."""
    check_evaluation(evaluation)
    for key in ("attribute", "polarity", "backbone_fingerprint", *_UNSAID):
        mine, evaluated = (each.get(key, _UNSAID.get(key)) for each in (config, evaluation["head"]))
        if mine != evaluated:
            raise ValueError(
                f"`evaluation` is of a head with {key} {evaluated!r}, but this head has {mine!r}: evaluate this one."
            )


def _runtime(polarity: str, evaluation: Mapping[str, Any] | None) -> str:
    """Which configuration a user of the head starts with."""
    main = main_run(evaluation) if evaluation else None
    abstains = polarity == "desirable" if main is None else main["method"] == "abstain"
    return "AbstentionConfig" if abstains else "ValueFilterConfig"


def _check_limits(limits: str | None) -> None:
    if limits is not None and not limits.strip():
        raise ValueError("`limits` has no text: say where the head fails, and where it must not be used.")
    if limits is not None and _MARKER.search(limits):
        raise ValueError(
            '`limits` holds a line that begins with "<!-- limits" or "<!-- /limits", as the lines around '
            "it in a card do: leave that line out."
        )


def _title(config: Mapping[str, Any]) -> str:
    return f"Value head: {config['attribute'] or 'unnamed attribute'}"


def _metadata(
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    datasets: Sequence[str] | None,
    license: str | None,
) -> ModelCardData:
    """What the Hub reads of a card."""
    return ModelCardData(
        library_name=LIBRARY_NAME,
        base_model=config["backbone"],
        base_model_relation="adapter" if config["backbone"] else None,
        datasets=list(datasets) if datasets else None,
        license=license,
        tags=["value-head", "value-steering", *_attribute_names(config)],
        model_name=_title(config) if evaluation else None,
        eval_results=(model_index(evaluation) or None) if evaluation else None,
    )


def _described(facts: Facts, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the head itself says, for the template."""
    config = facts.config
    return {
        "title": plain(_title(config)),
        "architecture": {"mlp": "three-layer MLP", "linear": "linear map"}[config["architecture"]],
        "parameters": f"{facts.parameters:,}",
        "hidden_size": config["hidden_size"],
        "feature": _feature(config.get("feature_layers", _UNSAID["feature_layers"])),
        "memory": _memory(config),
        "polarity": config["polarity"],
        "threshold": _threshold(config["threshold"], calibration) + _operating_point(config.get("operating_point")),
        "attributes": _attributes_markdown(config) if config.get("attributes") else "",
        "chat_template": recorded(config["chat_template"]),
        "feature_dtype": recorded(config["feature_dtype"]),
        "training": training_markdown(config["training"]),
    }


def _threshold(threshold: float | None, calibration: Mapping[str, Any] | None) -> str:
    """The default threshold in a sentence, and the alpha that has it: the largest, if there are several."""
    if threshold is None:
        return "It has no default threshold."
    alphas = alphas_of(threshold, calibration)
    return f"Default threshold: {threshold:.4g}" + (f", that of `alpha={max(alphas):g}`." if alphas else ".")


def _operating_point(point: Mapping[str, Any] | None) -> str:
    """How a filter uses the head, in a sentence."""
    return (
        f" A filter uses it with {', '.join(f'{name}={choice}' for name, choice in point.items())}." if point else ""
    )


def _feature(layers: Sequence[int | float | str]) -> str:
    """The places that a head reads, in words."""
    names = [_place(layer) for layer in layers]
    return names[0] if len(names) == 1 else f"side by side: {'; '.join(names)}"


def _place(layer: int | float | str) -> str:
    if layer == "final":
        return "final layer, after the final norm"
    if isinstance(layer, float):
        return f"output of the decoder layer at {100 * layer:g} % of the depth"
    return f"output of decoder layer {layer}, counted from {'0' if int(layer) >= 0 else 'the end'}"


def _memory(config: Mapping[str, Any]) -> str:
    """What it remembers of a text; nothing for most heads."""
    mean = {
        "mean": "the mean",
        "ema": f"an exponential mean (decay {config.get('temporal_decay')})",
    }.get(config.get("temporal", _UNSAID["temporal"]))
    if mean is None:
        return ""
    return f"It remembers {mean} of what its first layer makes of a text, from the last token of the prompt on.\n"


def _attribute_names(config: Mapping[str, Any]) -> list[str]:
    if config.get("attributes"):
        return [attribute["name"] for attribute in config["attributes"]]
    return [config["attribute"]] if config["attribute"] else []


def _attributes_markdown(config: Mapping[str, Any]) -> str:
    """What a head of several attributes values, and how that is one value."""
    rows = [[plain(each["name"]), each["polarity"], f"{each['threshold']:.4g}"] for each in config["attributes"]]
    meaning = "The worst of several attributes gives the value: below one half, each passes its own threshold."
    head = ["attribute", "a high value of it is", "threshold"]
    if config["combine"] == "sum":
        meaning = (
            "The value is the weighted mean of how far several attributes are beyond their thresholds, in log odds."
        )
        head.append("weight")
        rows = [[*row, f"{each['weight']:g}"] for row, each in zip(rows, config["attributes"], strict=True)]
    return f"{meaning}\n\n{table(head, rows)}"


def _known_limits(evaluation: Mapping[str, Any] | None, calibration: Mapping[str, Any] | None) -> list[str]:
    limits = []
    if evaluation is None:
        limits.append("Nothing was measured: this card holds no evaluation.")
    else:
        limits.append("Rates are what these judges see, on these prompts and with this sampling, and no more.")
        if all(judge["gave_labels"] for judge in evaluation["judges"]):
            limits.append("No judge but the one that gave the labels was asked: the head may have learned its errors.")
    if calibration is None:
        limits.append("The threshold is a choice, not a guarantee: no bound on needless interventions is claimed.")
    return limits
