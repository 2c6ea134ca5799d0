"""`train`: from a labelled collection to a saved head."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from hf_value_steer.arguments.base import renamed
from hf_value_steer.arguments.train import SUGGESTED, TrainArguments
from hf_value_steer.backbone.features import Layer
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.files.reading import read_object, read_record, reading
from hf_value_steer.files.writing import claim, write_json
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.balance import (
    refuse_one_class,
    refuse_what_cannot_be_told,
    report_balance,
    report_hard_negatives,
)
from hf_value_steer.training.chance import METRICS, chance_report
from hf_value_steer.training.checkpoints import train_on, training_arguments
from hf_value_steer.training.label import Labels
from hf_value_steer.training.layers import suggest_feature_layers
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.targets import Targets
from hf_value_steer.training.trainer import (
    HeadInTraining,
    StopAtChance,
    TokenRows,
    ValueHeadTrainer,
    feature_moments,
)


logger = logging.getLogger(__name__)

PROBED = 2000  # rows, to choose a layer


def train(arguments: TrainArguments) -> ValueHead:
    """Train a head and save it with a record of its training. A head that is there already is loaded.

    A training that was stopped goes on from its last epoch and ends with the same head. It says how many texts and
    tokens are positive. A head whose values are no better than chance on the validation texts, by the AUROC of the
    mean value of a text (one-sided, 95 %), is not saved unless `accept_chance` says so; then nothing is trained
    again.

    Raises:
        ValueError: if labels are missing, all of one class, or the folder holds another head; if the head is no
            better than chance, or the validation texts are too few to tell.
    """
    output, collection = Path(arguments.output), Collection(arguments.collection)
    recorded = _recorded(collection, arguments)
    record = output / "training.json"
    if record.exists():
        if _in_todays_words(recorded_arguments(record)) != recorded:
            raise ValueError(f"{output} holds a head that was trained otherwise: choose another folder.")
        head: ValueHead = ValueHead.from_pretrained(output)
        _refuse_chance(head.config.training, arguments)
        return head
    rows, work = split_rows(collection, arguments), output / "checkpoints"
    head, history = _fitted(collection, arguments, rows, work)
    head.config.training = {
        "preset": arguments.preset,
        **asdict(arguments.settings()),
        "seed": arguments.seed,
        **({"attributes": arguments.attributes} if arguments.attributes else {"judge": arguments.judge}),
        **(head.config.training or {}),
        "metrics": history[-1],
    }
    _refuse_chance(head.config.training, arguments)
    head.save_pretrained(output)
    splits = {name: len(members) for name, members in rows.items()}
    prompts = collection.manifest.get("prompts_sha256")
    write_json(record, {"arguments": recorded, "history": history, "splits": splits, "prompts_sha256": prompts})
    shutil.rmtree(work)
    return head


def _fitted(
    collection: Collection, arguments: TrainArguments, rows: Mapping[str, Sequence[int]], work: Path
) -> tuple[ValueHead, list[dict[str, Any]]]:
    """What [`fit`] returns, kept in `work`: whoever accepts a head at chance does not train it again."""
    done, claimed = work / "history.json", work / "arguments.json"
    if done.exists() and _in_todays_words(read_record(claimed)) != _learned(collection, arguments):
        shutil.rmtree(work)  # of a head that was refused
    if not done.exists():
        head, history = fit(collection, arguments, rows["train"], rows["validation"], work)
        head.save_pretrained(work / "head")
        write_json(done, history)
    return ValueHead.from_pretrained(work / "head"), read_record(done, kind=list)


def recorded_arguments(record: Path) -> dict[str, Any]:
    """The arguments that a `training.json` holds."""
    with reading(record, "record of a training", "Put the original back, or delete it and train again"):
        return dict(read_object(record)["arguments"])


def _in_todays_words(recorded: Any) -> dict[str, Any]:
    """The arguments in a record, which may be older than the names of today."""
    return renamed(TrainArguments, recorded)


def _recorded(collection: Collection, arguments: TrainArguments) -> dict[str, Any]:
    """What makes the head, but for the labels."""
    return {**arguments.record(), "collection_sha256": collection.digest()}


def _learned(collection: Collection, arguments: TrainArguments) -> dict[str, Any]:
    """What makes the head: a judge that was mended has other labels under the same name."""
    labels = {judge: Labels(collection, judge).digest() for judge in arguments.judges()}
    return {**_recorded(collection, arguments), "labels_sha256": labels}


def _refuse_chance(training: Mapping[str, Any] | None, arguments: TrainArguments) -> None:
    """Raise a `ValueError` for a head at chance, unless that is accepted."""
    report = chance_report(training)
    if report and not arguments.accept_chance:
        raise ValueError(
            f"The head is not shown to be better than chance: {report}. Collect more prompts or `samples`, look "
            "whether the judge's labels make sense, or try another `preset` or `target`. To go on with this head all "
            "the same say `accept_chance`: nothing is trained again."
        )


def fit(
    collection: Collection,
    arguments: TrainArguments,
    train_rows: Sequence[int],
    validation_rows: Sequence[int],
    work: Path,
) -> tuple[ValueHead, list[dict[str, Any]]]:
    """Fit a head on some rows and stop on others.

    Args:
        collection: labelled generations.
        arguments: how to train; `output` is not written.
        train_rows, validation_rows: indices of rows.
        work: folder for checkpoints; training goes on from the last one in it. It remembers what it is for.

    Returns:
        The head of the best epoch, and the metrics of every epoch, those of the best one last. What cannot be
        computed, such as the AUROC where all labels are on one side, is `None`.
    """
    claimed = _learned(collection, arguments)
    arguments = _with_layers(collection, arguments, train_rows)
    settings, judges = arguments.settings(), arguments.judges()
    targets = Targets(collection, judges, settings.target)
    refuse_one_class(targets, train_rows, judges)
    refuse_what_cannot_be_told(targets, validation_rows, judges, arguments.accept_chance)
    report_balance(targets, judges, {"training": train_rows, "validation": validation_rows})
    examples = report_hard_negatives(targets, judges, train_rows) if settings.target == "onset" else None
    layers, whole = _layers(collection, arguments), arguments.temporal != "none"
    training, validation = (TokenRows(targets, rows, layers, whole) for rows in (train_rows, validation_rows))
    set_seed(arguments.seed)
    model = _new_model(training, arguments)
    trainer = ValueHeadTrainer(
        model=model,
        args=_training_arguments(arguments, work),
        train_dataset=training,
        eval_dataset=validation,
        callbacks=[
            EarlyStoppingCallback(early_stopping_patience=settings.patience),
            *(() if arguments.accept_chance else (StopAtChance(settings.patience),)),
        ],
    )
    _claim(work / "arguments.json", claimed)
    train_on(trainer)
    history = _history(trainer.state.log_history, [each["name"] for each in arguments.head_attributes()])
    if not (finite := [entry for entry in history if entry["loss"] is not None]):
        raise ValueError(
            f"The validation loss was never finite: lower `learning_rate` (it is {settings.learning_rate:g}), or look "
            "for infinite features in the collection."
        )
    head = model.folded()
    head.config.training = {"examples": examples} if examples else None
    return head, [*history, min(finite, key=lambda entry: entry["loss"])]


def _with_layers(collection: Collection, arguments: TrainArguments, rows: Sequence[int]) -> TrainArguments:
    """The arguments with the layer and the memory that are suggested for these rows, if that is asked for."""
    if arguments.feature_layers != [SUGGESTED]:
        return arguments
    target, judge = arguments.settings().target, str(arguments.judge)
    best = suggest_feature_layers(collection, judge, rows, target=target, limit=PROBED).best
    logger.info(f"Layer {best.layer}, temporal {best.temporal!r}: the cheapest that may be as good as the best one.")
    return replace(arguments, feature_layers=[best.layer], temporal=best.temporal)


def _layers(collection: Collection, arguments: TrainArguments) -> tuple[Layer, ...]:
    """The layers that the head reads. All of a model are for probes: nobody means a head on all of them."""
    if arguments.feature_layers is None and collection.manifest.get("arguments", {}).get("feature_layers") == ["all"]:
        raise ValueError(
            f"{collection.folder} keeps all {len(collection.layers)} layers: say with `feature_layers` which of them "
            "the head is to read. `hf-value-steer layers` helps to choose."
        )
    return collection.resolve(arguments.feature_layers)


def _claim(path: Path, learned: dict[str, Any]) -> None:
    if path.exists():
        write_json(path, _in_todays_words(read_record(path)))
    claim(path, learned)


def _history(log: Sequence[Mapping[str, Any]], attributes: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of every epoch that a `Trainer` has logged."""
    metrics = ("auroc", "calibration_error")
    of_texts = METRICS if not attributes else ()
    single = [f"{metric}_{name}" for name in attributes for metric in (*metrics, *METRICS)]
    kept = ("epoch", *(f"eval_{name}" for name in ("loss", *metrics, *of_texts, *single)))
    evaluations = [entry for entry in log if "eval_loss" in entry]
    return [{name.removeprefix("eval_"): _finite(entry.get(name)) for name in kept} for entry in evaluations]


def _finite(metric: Any) -> Any:
    return None if isinstance(metric, float) and not math.isfinite(metric) else metric


def _new_model(training: TokenRows, arguments: TrainArguments) -> HeadInTraining:
    collection, settings = training.targets.collection, arguments.settings()
    head = _new_head(collection, training.layers, arguments)
    widths = [collection.width([layer]) for layer in training.layers]
    mean, scale, head.config.feature_norms = feature_moments(training, widths)
    return HeadInTraining(head, mean, scale, settings.loss, settings.positive_weight, settings.coherence_weight)


def _new_head(collection: Collection, layers: Sequence[Layer], arguments: TrainArguments) -> ValueHead:
    manifest = collection.manifest
    return ValueHead(
        ValueHeadConfig(
            hidden_size=collection.width(layers),
            architecture=arguments.architecture,
            projection_size=arguments.projection_size,
            feature_layers=list(layers),
            temporal=arguments.temporal,
            temporal_decay=arguments.temporal_decay,
            polarity=arguments.polarity,
            attribute=arguments.attribute,
            attributes=arguments.head_attributes() or None,
            combine=arguments.combine,
            backbone=manifest["backbone"],
            backbone_fingerprint=manifest["backbone_fingerprint"],
            feature_dtype=manifest["feature_dtype"],
            chat_template=manifest["chat_template"],
        )
    )


def _training_arguments(arguments: TrainArguments, work: Path) -> TrainingArguments:
    settings = arguments.settings()
    return training_arguments(
        work,
        arguments.batch_rows,
        arguments.seed,
        arguments.trainer,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=0.1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        label_names=["labels"],
    )
