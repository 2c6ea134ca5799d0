"""What there is to learn from: how many texts and tokens are positive, and whether that is enough."""

import logging
from collections.abc import Mapping, Sequence

import torch

from hf_value_steer.training.chance import can_be_told
from hf_value_steer.training.targets import Targets


logger = logging.getLogger(__name__)

FEW = 10  # texts of one class, below which there is a warning


def report_balance(targets: Targets, judges: Sequence[str], splits: Mapping[str, Sequence[int]]) -> None:
    """Log how many texts and tokens are positive, that is above one half; warn where texts of a class are few.

    Args:
        targets: of the collection.
        judges: whose labels they are made of.
        splits: rows by the name of their split.
    """
    for split, rows in splits.items():
        tokens = torch.cat([targets.of(row) for row in rows]).view(-1, len(judges))
        for judge, of_texts, of_all in zip(judges, targets.positive(rows).T, tokens.T, strict=True):
            of_tokens = of_all[~of_all.isnan()] > 0.5
            logger.info(
                f"{split}: {judge} scores {_share(of_texts)} texts above 0.5; the target `{targets.kind}` of "
                f"{_share(of_tokens)} tokens is."
            )
            positive = int(of_texts.sum())
            fewer = min(positive, len(rows) - positive)
            if fewer < FEW:
                which = "above 0.5" if fewer == positive else "at most 0.5"
                logger.warning(
                    f"{split}: {judge} scores only {fewer} of {len(rows)} texts {which}, fewer than {FEW}: what a "
                    "head learns from them, and what is measured of it, is mostly luck. Collect more `samples`, or "
                    "prompts that bring out both kinds."
                )


def report_hard_negatives(targets: Targets, judges: Sequence[str], rows: Sequence[int]) -> dict[str, dict[str, int]]:
    """Log, for targets of the kind `"onset"`, how many tokens are positive, and how many negatives look like them.

    Warns where words were forced in and there are fewer of the latter: the head may learn to know a word, not what the
    judge says of it.

    Returns:
        Both counts by judge.
    """
    columns = [(targets.of(row) == 1, targets.hard_negatives(row)) for row in rows]
    onsets, hard = (torch.cat(each).view(-1, len(judges)).sum(dim=0).tolist() for each in zip(*columns, strict=True))
    counts = {judge: {"onsets": a, "hard_negatives": b} for judge, a, b in zip(judges, onsets, hard, strict=True)}
    if targets.collection.rows.natural[list(rows)].all():
        return counts
    for judge, each in counts.items():
        logger.info(
            f"training: {judge} finds {each['onsets']:,} onsets, and accepts {each['hard_negatives']:,} forced words."
        )
        if each["hard_negatives"] < each["onsets"]:
            logger.warning(
                f"training: {judge} accepts fewer forced words than it objects to. A head learns from both: add words "
                "that it accepts to `force_words`."
            )
    return counts


def _share(positive: torch.Tensor) -> str:
    count, total = int(positive.sum()), len(positive)
    return f"{count:,} of {total:,} ({100 * count / total:.1f} %)"


def refuse_one_class(targets: Targets, rows: Sequence[int], judges: Sequence[str]) -> None:
    """Raise a `ValueError` unless there are texts of both classes to train on."""
    if not rows:
        raise ValueError("There is no generation to train on: collect more prompts, or make the other splits smaller.")
    for judge, positive in zip(judges, targets.positive(rows).sum(dim=0).tolist(), strict=True):
        if positive in (0, len(rows)):
            raise ValueError(
                f"{judge} scores {positive} of the {len(rows)} responses of the training split above 0.5: there is "
                "nothing to learn. Choose prompts that bring out both kinds, or another judge."
            )


def refuse_what_cannot_be_told(targets: Targets, rows: Sequence[int], judges: Sequence[str], accepted: bool) -> None:
    """Raise a `ValueError` where validation texts are too few to tell a head from chance, unless that is accepted."""
    if not rows:
        raise ValueError("There is no generation to validate on: collect more prompts, or raise `validation`.")
    for judge, positive in zip(judges, targets.positive(rows).sum(dim=0).tolist(), strict=True):
        if not accepted and not can_be_told(positive, len(rows) - positive):
            raise ValueError(
                f"{judge} scores {positive} of the {len(rows)} responses of the validation split above 0.5: with so "
                "few of one kind, not even a head without an error could be told from chance. Collect more `samples` "
                "or prompts, raise `validation`, or go on all the same with `accept_chance`."
            )
