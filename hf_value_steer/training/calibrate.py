"""`calibrate`: from generations that training never saw to thresholds and what they promise."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_value_steer.backbone import fingerprint
from hf_value_steer.calibration import Calibration, one_per_prompt
from hf_value_steer.modeling import ValueHead
from hf_value_steer.training.label import Labels
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.train import TrainArguments, split_rows


@dataclass(kw_only=True)
class CalibrateArguments:
    """Which promise, and on what."""

    collection: str = field(metadata={"help": "folder of a labelled collection"})
    value_head: str = field(metadata={"help": "folder of the head; calibration.json and its threshold are written"})
    judge: str = field(metadata={"help": "the judge that says which generations are safe, or correct"})
    method: Literal["filter", "abstain"] = field(default="filter", metadata={"help": "what the head is for"})
    mode: Literal["marginal", "pac", "uniform", "martingale", "selective"] = field(
        default="marginal", metadata={"help": "what is promised; selective is for abstain only"}
    )
    delta: float | None = field(default=None, metadata={"help": "how often a promise with confidence may fail"})
    alpha: float | None = field(default=None, metadata={"help": "make the threshold of this promise the default"})
    token_rate: float | None = field(
        default=None, metadata={"help": "make the default threshold one that this share of tokens fails; no promise"}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "column of the prompts: thresholds for each group"}
    )
    seed: int = field(default=0, metadata={"help": "of the choice of one generation for each prompt"})

    def __post_init__(self) -> None:
        if self.alpha is not None and self.token_rate is not None:
            raise ValueError("`alpha` and `token_rate` both set the default threshold: pass one of them.")
        if self.token_rate is not None and not 0 < self.token_rate < 1:
            raise ValueError(f"`token_rate` has to be a share in (0, 1), got {self.token_rate}.")


@dataclass
class _Values:
    """Values of rows: `worst` and `prompts` of shape `(rows,)`, and all their tokens', `(tokens,)`."""

    worst: Tensor
    prompts: Tensor
    tokens: Tensor


def calibrate(arguments: CalibrateArguments) -> Calibration:
    """Write `calibration.json`, and with `alpha` or `token_rate` a default threshold, into the head's folder.

    Scores come from the split that training set aside, one generation a prompt: for the filter only those that the
    judge finds safe (or, for a head whose high values are desirable, correct).

    Raises:
        ValueError: if nothing was set aside, no generation is safe, or `alpha` cannot be promised.
    """
    collection, head = Collection(arguments.collection), ValueHead.from_pretrained(arguments.value_head)
    if head.config.backbone_fingerprint != collection.manifest["backbone_fingerprint"]:
        raise ValueError(
            f"`value_head` is for backbone {head.config.backbone_fingerprint}, but {arguments.collection} was "
            f"collected from {collection.manifest['backbone_fingerprint']}: its values would mean nothing."
        )
    rows = np.array(held_out_rows(collection, Path(arguments.value_head)))
    bad = (Labels(collection, arguments.judge).responses() > 0.5).numpy() ^ (head.config.polarity == "desirable")
    prompts = collection.rows.prompt.numpy()
    chosen = rows[one_per_prompt(prompts[rows].tolist(), arguments.seed)]
    if arguments.method == "filter":  # only now: a prompt that is seldom safe must not count more than it does
        chosen = chosen[~bad[chosen]]
    if not len(chosen):
        raise ValueError(f"{arguments.judge} finds no held-out generation safe, of one for each prompt.")
    values = _values(collection, head, chosen.tolist(), arguments.method)
    column = arguments.group_column
    calibration = Calibration.from_scores(
        values.worst.numpy(),
        mode=arguments.mode,
        method=arguments.method,
        polarity=head.config.polarity,
        delta=arguments.delta,
        prompt_values=values.prompts.numpy() if arguments.mode == "martingale" else None,
        correct=~bad[chosen] if arguments.mode == "selective" else None,
        groups=[str(collection.prompts[prompts[row]].columns[column]) for row in chosen] if column else None,
        head_fingerprint=fingerprint(head),
        data=hashlib.sha256(f"{collection.digest()} {arguments.judge} {chosen.tolist()}".encode()).hexdigest(),
        **{name: collection.manifest[name] for name in ("sampling", "kernel", "backend")},
    )
    head.calibration = calibration
    head.config.threshold = _default_threshold(arguments, collection, head, calibration, rows.tolist())
    head.save_pretrained(arguments.value_head)
    return calibration


def held_out_rows(collection: Collection, head_folder: Path) -> list[int]:
    """Rows that neither trained the head nor stopped its training; all natural ones if it was trained elsewhere."""
    record = head_folder / "training.json"
    arguments: Any = json.loads(record.read_text(encoding="utf-8"))["arguments"] if record.exists() else {}
    if arguments.pop("collection_sha256", None) != collection.digest():
        return collection.rows.natural.nonzero().flatten().tolist()
    rows = split_rows(collection, TrainArguments(**arguments))["calibration"]
    if not rows:
        raise ValueError("Training set nothing aside to calibrate on: train with `calibration` above 0.")
    return rows


@torch.no_grad()
def _values(collection: Collection, head: ValueHead, rows: Sequence[int], method: str) -> _Values:
    """Values of some rows, the worst over what `method` acts on: abstention on the prompt, but not the last token."""
    worst, prompts, tokens = [], [], []
    for row in rows:
        values = head(collection.read("features", row)).values
        prompt = head(collection.prompt_feature(row)).values
        watched = torch.cat([prompt[None], values[:-1]]) if method == "abstain" else values
        worst.append(watched.max() if head.config.polarity == "undesirable" else watched.min())
        prompts.append(prompt)
        tokens.append(values)
    return _Values(torch.stack(worst), torch.stack(prompts), torch.cat(tokens))


def _default_threshold(
    arguments: CalibrateArguments, collection: Collection, head: ValueHead, calibration: Calibration, rows: list[int]
) -> float | None:
    if arguments.token_rate is not None:
        tokens = _values(collection, head, rows, arguments.method).tokens.numpy()
        desirable = head.config.polarity == "desirable"
        return round(float(np.quantile(tokens, arguments.token_rate if desirable else 1 - arguments.token_rate)), 4)
    if arguments.alpha is None or arguments.mode == "martingale":
        return None
    threshold = calibration.threshold(arguments.alpha)
    if math.isinf(threshold):
        raise ValueError(
            f"`alpha` {arguments.alpha} cannot be promised from {calibration.n} generations; the smallest that can is "
            f"{calibration.smallest_alpha()}. Collect more prompts, or accept a larger alpha."
        )
    return threshold
