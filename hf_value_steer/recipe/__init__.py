"""A recipe: collect, train, calibrate, evaluate and push, or train a guidance module, all from one YAML file."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.evaluation.crossfit import evaluate_crossfitted
from hf_value_steer.evaluation.evaluate import evaluate
from hf_value_steer.files.marked import Marked, read_marked
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.writing import write_atomically
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hub import push_head, renew_card
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.collect import collect
from hf_value_steer.training.guidance.train import train_guidance
from hf_value_steer.training.train import train
from hf_value_steer.vllm.start import vllm_engine


logger = logging.getLogger(__name__)


def run_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> Path:
    """Do what a recipe says. A run that was stopped goes on; what is done already is not done again.

    How long each step took is logged.

    ```yaml
    output: runs/my-attribute        # collection/, head/, evaluation/ and module/ appear in it
    collect: {model: org/backbone, prompts: prompts.txt, samples: 4}
    label: {judges: ["lexicon:words.txt"]}
    train: {attribute: my-attribute}
    calibrate: {alpha: 0.1}          # `prompts: others.txt` in it: of one fresh text for each of these, calibration/
    evaluate: {prompts: unseen.txt, judges: ["classifier:org/judge"]}
    # or, where prompts are few: {folds: 4, judges: [...]}, see [`evaluate_crossfitted`]
    guide: {attribute: my-attribute} # a guidance module, beside a head or, without `train`, instead of one
    ```

    A head of several attributes learns from a judge of `label` for each, not from the first one:

    ```yaml
    label: {judges: ["lexicon:rude.txt", "python:mine:polite"]}
    train: {attributes: ["rude=lexicon:rude.txt", "polite=python:mine:polite@desirable"]}
    ```

    Sections hold the fields of [`CollectArguments`], [`LabelArguments`], [`TrainArguments`], [`CalibrateArguments`],
    [`EvaluateArguments`] and [`GuidanceTrainArguments`]; folders are filled in, the first judge of `label` gives the
    labels, and the backbone and how it samples are those of `collect` unless another section says otherwise.
    `calibrate`, `evaluate`, `card` (`limits`, `license`, `datasets`) and `push` (arguments of
    [`~hf_value_steer.hub.push_head`]) belong to a head, and may be left out.

    Args:
        recipe: file, or its content.

    Returns:
        The folder of what was trained: of the head, if there is one.

    Raises:
        ValueError: before anything is generated, for what is no recipe, names file, line and key; and for a judge, a
            function, a file or a column that is not there. For a head that learned nothing, see
            [`~hf_value_steer.training.train.train`].
    """
    steps = Steps(Marked(recipe) if isinstance(recipe, Mapping) else read_marked(Path(recipe)))
    steps.look_for_sources()
    with _timed("collect"):
        collect(steps.collect, steps.label, vllm_engine)
        if steps.fresh is not None:
            collect(steps.fresh, replace(steps.label, prefixes=False), vllm_engine)
    trained = []
    if steps.train is not None:
        trained.append(_make_head(steps, steps.train))
    if steps.guide is not None:
        with _timed("guide"):
            train_guidance(steps.guide)
        trained.append(Path(steps.guide.output))
    return trained[0]


def _make_head(steps: "Steps", arguments: TrainArguments) -> Path:
    with _timed("train"):
        train(arguments)
    if steps.calibrate is not None:
        with _timed("calibrate"):
            calibrate(steps.calibrate)
    if steps.evaluate is not None:
        with _timed("evaluate"):
            _evaluate(steps, steps.evaluate, arguments)
    head, results = Path(arguments.output), Path(steps.evaluate.output) if steps.evaluate else None
    _renew_card(head, results, steps.card)
    if steps.push is not None:
        push_head(head, **steps.push, evaluation=results)
    return head


def _evaluate(steps: "Steps", arguments: EvaluateArguments, training: TrainArguments) -> None:
    if steps.calibrate is not None and steps.folds:
        evaluate_crossfitted(arguments, training, steps.calibrate, steps.folds)
    else:
        evaluate(arguments)


@contextmanager
def _timed(step: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    logger.info(f"{step}: {minutes} min {seconds} s")


def _renew_card(head: Path, results: Path | None, said: Mapping[str, Any]) -> None:
    """The card of the finished head, with what was measured of it, and what the recipe says."""
    card = head / "README.md"
    document = read_record(results / "evaluation.json") if results else None
    text = renew_card(ValueHead.from_pretrained(head), card.read_text(encoding="utf-8"), document, **said)
    write_atomically(card, text.encode())
