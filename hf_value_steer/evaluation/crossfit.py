"""Cross-fitting: evaluate on all prompts of a collection, each steered by a head that never saw it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.evaluation.evaluate import Evaluator
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.train import train


def evaluate_crossfitted(
    arguments: EvaluateArguments, training: TrainArguments, calibration: CalibrateArguments, folds: int
) -> dict[str, Any]:
    """Train one head for each fold of the collection's prompts, without them, and steer them with it.

    For collections that are too small to set prompts aside: what is reported is how heads of this kind do on prompts
    that they never saw; the head that `training` names may have been trained on all of them.

    Args:
        arguments: as for [`~hf_value_steer.evaluation.evaluate.evaluate`]; its `prompts` are not read.
        training, calibration: how the heads are made; the folds' heads lie below `arguments.output`.
        folds: at least 2.

    Returns:
        The content of `evaluation.json`.
    """
    if folds < 2:
        raise ValueError(f"`folds` has to be at least 2, got {folds}.")
    collection, evaluator, parts = Collection(training.collection), Evaluator(arguments), []
    for fold in range(folds):
        folder = Path(arguments.output) / f"fold-{fold}"
        own = without_fold(training, str(folder / "head"), fold, folds)
        train(own)
        calibrate(replace(calibration, value_head=own.output))
        prompts = held_out_prompts(collection, own)
        parts.append(evaluator.part(ValueHead.from_pretrained(own.output), prompts, folder / "runs"))
    return evaluator.report(ValueHead.from_pretrained(arguments.value_head), parts)


def without_fold(training: TrainArguments, output: str, fold: int, folds: int) -> TrainArguments:
    """How the head of a fold is trained: without its prompts, which are the split `"held_out"`."""
    return replace(
        training,
        output=output,
        held_out=1 / folds,
        rotation=fold / folds,
        accept_chance=True,  # what it is worth is what is about to be measured
    )


def held_out_prompts(collection: Collection, training: TrainArguments) -> list[Prompt]:
    """The prompts that a fold's head is steered on, as they are numbered."""
    rows = torch.tensor(split_rows(collection, training)["held_out"])
    return [collection.prompts[index] for index in sorted(set(collection.rows.prompt[rows].tolist()))]
