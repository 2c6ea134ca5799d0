"""Checkpoints of a `Trainer` that are whole or do not count: their files are written, and deleted, one by one."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from hf_value_steer.checks import closest
from hf_value_steer.errors import FieldError
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.writing import write_json


MARK = "complete.json"  # names and sizes of the files of a checkpoint, written after all of them


def check_further(further: Sequence[str]) -> None:
    """Raise a [`FieldError`] unless each is `name=value`, with the name of a field of `TrainingArguments`."""
    known = [each.name for each in fields(TrainingArguments)]
    for entry in further:
        name, equals, _ = entry.partition("=")
        if not equals:
            raise FieldError("trainer", f"`trainer` takes entries name=value, got {entry!r}.")
        if name not in known:
            hint = f": did you mean {close}?" if (close := closest(name, known)) else "."
            raise FieldError("trainer", f"`trainer`: {name!r} is no argument of TrainingArguments{hint}")


def training_arguments(folder: Path, rows: int, seed: int, further: Sequence[str], **own: Any) -> TrainingArguments:
    """What the trainings here have in common: an evaluation and a checkpoint after each epoch, and no reports.

    Args:
        folder: of the checkpoints.
        rows: in one step.
        further: `name=value`, where the value is JSON or text; they go before all others.
        own: what is not the same in all trainings.
    """
    shared = {
        "output_dir": str(folder),
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "remove_unused_columns": False,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }
    check_further(further)
    parted = (entry.partition("=") for entry in further)
    given = {name: _json_or_text(choice) for name, _, choice in parted}
    try:
        return TrainingArguments(**shared | own | given)
    except TypeError as error:
        raise ValueError(f"`trainer`: {error}.") from error


def _json_or_text(choice: str) -> Any:
    try:
        return json.loads(choice)
    except (RecursionError, ValueError):
        return choice


def train_on(trainer: Trainer) -> None:
    """Train, from the last whole checkpoint in the trainer's folder if there is one."""
    trainer.add_callback(_MarkComplete())
    trainer.train(resume_from_checkpoint=_last_complete(Path(trainer.args.output_dir)))


class _MarkComplete(TrainerCallback):  # type: ignore[misc]
    """Marks every checkpoint when it is saved."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del control, kwargs
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_json(folder / MARK, {path.name: path.stat().st_size for path in folder.iterdir()})


def _last_complete(folder: Path) -> str | None:
    """The last whole checkpoint in a folder. What is left of others is deleted."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not _is_complete(checkpoint):
            shutil.rmtree(checkpoint)
    found: str | None = get_last_checkpoint(str(folder))
    return found


def _is_complete(checkpoint: Path) -> bool:
    mark = checkpoint / MARK
    if not mark.exists():
        return False
    sizes = read_record(mark)
    return all((checkpoint / name).exists() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)
