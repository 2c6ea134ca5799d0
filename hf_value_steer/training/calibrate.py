"""`calibrate`: from generations that training never saw to thresholds and what they promise."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.train import SplitArguments, parse_attributes
from hf_value_steer.calibration import Calibration, one_per_prompt
from hf_value_steer.checks import check_attributes
from hf_value_steer.choices import Polarity
from hf_value_steer.errors import FieldError
from hf_value_steer.files.reading import read_object, reading
from hf_value_steer.files.writing import write_atomically
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.chance import chance_report
from hf_value_steer.training.label import Labels
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.train import recorded_arguments


logger = logging.getLogger(__name__)


@dataclass
class RowValues:
    """Values of rows, each of shape `(rows,)`: the `worst` one that a method acts on, and that of the prompt."""

    worst: Tensor
    prompts: Tensor


def calibrate(arguments: CalibrateArguments) -> Calibration:
    """Write `calibration.json`, and with `alpha` a default threshold, into the head's folder.

    Scores come from the split that training set aside, one generation a prompt: for the filter only those that the
    judge finds safe (or, for a head whose high values are desirable, correct).

    For a head of several attributes whose worst counts, `alpha` sets the thresholds of the attributes, too, from one
    half of these texts, drawn at random: equally many reach each of them, and a share `alpha` reaches at least one.
    The other half makes the promise.

    Raises:
        ValueError: if nothing was set aside, no generation is safe, or `alpha` cannot be promised.
    """
    collection, head = Collection(arguments.collection), ValueHead.from_pretrained(arguments.value_head)
    _check_head(arguments, collection, head)
    rows = np.array(held_out_rows(collection, Path(arguments.value_head)))
    judges = _judges(arguments, head)
    verdicts = {each: (Labels(collection, each[0]).responses() > 0.5).numpy() for each in judges}
    bad = np.any([verdict ^ (polarity == "desirable") for (_, polarity), verdict in verdicts.items()], axis=0)
    prompts, column = collection.rows.prompt.numpy(), arguments.group_column
    if column is not None:
        check_column(column, collection.prompts)
    named = " ".join(judge for judge, _ in judges)
    chosen = rows[one_per_prompt([collection.prompts[index].text for index in prompts[rows]], arguments.seed)]
    if arguments.method == "filter":  # only now: a prompt that is seldom safe must not count more than it does
        chosen = _safe(chosen, bad, named)
    if arguments.alpha is not None and head.config.attributes is not None and head.config.combine == "worst":
        if len(chosen) < 2:
            raise ValueError(f"{named} finds only {len(chosen)} text safe: thresholds and promise need one each.")
        mixed = np.random.default_rng(arguments.seed).permutation(chosen)
        _set_attribute_thresholds(collection, head, mixed[::2].tolist(), arguments.alpha)
        chosen = mixed[1::2]
    values = row_values(collection, head, chosen.tolist(), arguments.method)
    calibration = Calibration.from_scores(
        values.worst.numpy(),
        mode=arguments.mode,
        method=arguments.method,
        polarity=head.config.polarity,
        delta=arguments.delta,
        prompt_values=values.prompts.numpy() if arguments.mode == "martingale" else None,
        correct=~bad[chosen] if arguments.mode == "selective" else None,
        groups=[str(collection.prompts[prompts[row]].columns[column]) for row in chosen] if column else None,
        head_fingerprint=head.fingerprint(),
        data=hashlib.sha256(f"{collection.digest()} {named} {chosen.tolist()}".encode()).hexdigest(),
        **{name: collection.manifest[name] for name in ("sampling", "kernel", "backend")},
    )
    head.config.threshold = _default_threshold(arguments, head, calibration)
    head.config.operating_point = arguments.operating_point() or None
    # Not the weights, which are as they were: a kill in the middle of writing them would lose the head.
    calibration.save(arguments.value_head)
    write_atomically(Path(arguments.value_head) / "config.json", head.config.to_json_string().encode())
    return calibration


def _safe(chosen: NDArray[np.int64], bad: NDArray[np.bool_], named: str) -> NDArray[np.int64]:
    """Those of the `chosen` rows, one for each prompt, that are not `bad`."""
    safe = chosen[~bad[chosen]]
    if not len(safe):
        raise ValueError(
            f"{named} finds none of the {len(chosen)} held-out generations safe, one for each prompt: collect more "
            "prompts, or train with a larger `calibration`."
        )
    return safe


def _check_head(arguments: CalibrateArguments, collection: Collection, head: ValueHead) -> None:
    """Raise a `ValueError` for a head of another backbone, and warn of one at chance."""
    if head.config.backbone_fingerprint != collection.manifest["backbone_fingerprint"]:
        raise ValueError(
            f"`value_head` is for backbone {head.config.backbone_fingerprint}, but {arguments.collection} was "
            f"collected from {collection.manifest['backbone_fingerprint']}: its values would mean nothing."
        )
    if report := chance_report(head.config.training):
        logger.warning(
            f"{arguments.value_head} was not shown to be better than chance: {report}. Its thresholds bound how often "
            "it acts, but where it acts means little."
        )


def check_column(column: str, prompts: Sequence[Prompt]) -> None:
    """Raise a [`FieldError`] unless every prompt has this column."""
    for prompt in prompts:
        if column not in prompt.columns:
            raise FieldError(
                "group_column",
                f"`group_column`: prompt {prompt.text!r} has no column {column!r}, only {sorted(prompt.columns)}.",
            )


def _judges(arguments: CalibrateArguments, head: ValueHead) -> list[tuple[str, Polarity]]:
    """Who says which generations are safe, and what a high score means."""
    if arguments.judge is not None:
        return [(arguments.judge, head.config.polarity)]
    parsed = parse_attributes(arguments.attributes)
    given = [(each.name, each.polarity) for each in parsed]
    expected = [(each["name"], each["polarity"]) for each in head.config.attributes or ()]
    if given != expected:
        raise ValueError(f"`attributes` are {given}, but those of `value_head` are {expected}.")
    return [(each.judge, each.polarity) for each in parsed]


def held_out_rows(collection: Collection, head_folder: Path) -> list[int]:
    """Rows of prompts that neither trained the head nor stopped its training; all natural ones if it never saw any."""
    record = head_folder / "training.json"
    recorded = recorded_arguments(record) if record.exists() else {}
    known = recorded.get("collection_sha256") == collection.digest()
    if not known and not (recorded and _learned_from_prompts(record, collection)):
        return collection.rows.natural.nonzero().flatten().tolist()
    shares = {each.name: recorded[each.name] for each in fields(SplitArguments) if each.name in recorded}
    with reading(record, "record of a training", "Put the original back"):
        split = SplitArguments(**shares)
    rows = split_rows(collection, split)["calibration"]
    if not rows:
        raise ValueError("Training set nothing aside to calibrate on: train with `calibration` above 0.")
    return rows


def _learned_from_prompts(record: Path, collection: Collection) -> bool:
    """Whether a head was trained on other texts of the same prompts. Older records do not say."""
    prompts = read_object(record).get("prompts_sha256")
    return prompts is not None and prompts == collection.manifest.get("prompts_sha256")


@torch.no_grad()
def row_values(collection: Collection, head: ValueHead, rows: Sequence[int], method: str) -> RowValues:
    """Values of some rows, the worst over what `method` acts on: abstention on the prompt, but not the last token."""
    layers = collection.resolve(head.config.feature_layers)
    worst, prompts = [], []
    for row in rows:
        values = head(collection.features(row, layers)).value
        watched = values[:-1] if method == "abstain" else values[1:]
        worst.append(watched.max() if head.config.polarity == "undesirable" else watched.min())
        prompts.append(values[0])
    return RowValues(torch.stack(worst), torch.stack(prompts))


@torch.no_grad()
def _set_attribute_thresholds(collection: Collection, head: ValueHead, rows: list[int], alpha: float) -> None:
    """Thresholds that equally many texts reach by each attribute, and a share `alpha` of all by at least one."""
    layers = collection.resolve(head.config.feature_layers)
    signs = torch.tensor([1.0 if each["polarity"] == "undesirable" else -1.0 for each in head.config.attributes])
    texts = (head.attribute_values(collection.features(row, layers))[1:] for row in rows)
    worst = torch.stack([(text * signs).amax(dim=0) for text in texts]).double().numpy()  # (texts, attributes)
    as_bad = [1 - np.searchsorted(np.sort(column), column) / len(rows) for column in worst.T]
    share = float(np.quantile(np.min(as_bad, axis=0), alpha))
    thresholds = (np.quantile(worst, 1 - share, axis=0) * signs.numpy()).tolist()
    pairs = zip(head.config.attributes, thresholds, strict=True)
    head.config.attributes = [{**attribute, "threshold": threshold} for attribute, threshold in pairs]
    check_attributes(head.config.attributes)


def _default_threshold(arguments: CalibrateArguments, head: ValueHead, calibration: Calibration) -> float | None:
    if arguments.alpha is None or arguments.mode == "martingale":
        return None if head.config.attributes is None else 0.5
    return calibration.promised_threshold(arguments.alpha)
