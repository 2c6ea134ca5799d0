"""`guidance train`: from a labelled collection to a saved guidance module, in three stages."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.backbone.parts import num_layers
from hf_value_steer.configuration.guidance_module import GuidanceModuleConfig
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.writing import write_json
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.training.balance import refuse_one_class, refuse_what_cannot_be_told, report_balance
from hf_value_steer.training.checkpoints import train_on, training_arguments
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.guidance.data import (
    LabelledStates,
    ResponseBatch,
    Responses,
    disliked_tokens,
    join_states,
)
from hf_value_steer.training.guidance.layers import suggest_guidance_layer
from hf_value_steer.training.guidance.moments import GuidedMoments
from hf_value_steer.training.guidance.stages import (
    PARTS,
    BridgeStage,
    BridgeStageTrainer,
    ValueStage,
    ValueStageTrainer,
)
from hf_value_steer.training.guidance.states import States
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.targets import Targets
from hf_value_steer.training.train import recorded_arguments


STAGES = ("text", "pair", "bridge")


def train_guidance(arguments: GuidanceTrainArguments) -> GuidanceModule:
    """Train a module and save it with a record of its training. A module that is there already is loaded.

    A training that was stopped goes on from the last epoch of its stage, and ends with the same module.

    Raises:
        ValueError: if labels are missing, all of one class, or the folder holds another module.
    """
    output, collection = Path(arguments.output), Collection(arguments.collection)
    recorded = {**arguments.record(), "collection_sha256": collection.digest()}
    record = output / "training.json"
    if record.exists():
        if recorded_arguments(record) != recorded:
            raise ValueError(f"{output} holds a module that was trained otherwise: choose another folder.")
        return GuidanceModule.from_pretrained(output)  # type: ignore[no-any-return]
    training = _Training(arguments, collection)
    metrics = training.run()
    module = training.module
    module.config.training = {"stages": metrics, **{name: recorded[name] for name in ("target", "judge", "seed")}}
    module.save_pretrained(output)
    write_json(record, {"arguments": recorded, "metrics": metrics})
    shutil.rmtree(training.work)
    return module


class _Training:
    def __init__(self, arguments: GuidanceTrainArguments, collection: Collection):
        self.arguments, self.collection = arguments, collection
        self.targets = Targets(collection, [arguments.judge], arguments.target)
        if "prefixes" not in self.targets.labels[0].kinds:
            raise ValueError("Stage `bridge` learns from scores of prefixes: label again with `prefixes`.")
        self.rows = split_rows(collection, arguments)
        training, validation = self.rows["train"], self.rows["validation"]
        refuse_one_class(self.targets, training, [arguments.judge])
        refuse_what_cannot_be_told(self.targets, validation, [arguments.judge], accepted=True)
        report_balance(self.targets, [arguments.judge], {"training": training, "validation": validation})
        self.work = Path(arguments.output) / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, tokenizer = load_backbone(arguments.model, arguments.dtype, device)
        self.model.requires_grad_(False)
        self.formatter = Formatter(tokenizer, collection.manifest["arguments"]["chat"])
        set_seed(arguments.seed)
        self.module = GuidanceModule(self._config())
        self.states = States(collection, self.work / "states", self.model, self.formatter, self.module.config.layer)

    def _config(self) -> GuidanceModuleConfig:
        arguments, manifest = self.arguments, self.collection.manifest
        count = num_layers(self.model)
        if arguments.layer is not None and arguments.layer + 1 >= count:
            raise ValueError(
                f"`layer` has to be below {count - 1}, the last layer of the backbone; got {arguments.layer}."
            )
        sizes = {name: getattr(arguments, name) for name in ("layer", "num_bridges", "value_width")}
        if None in sizes.values():
            path = self.work / "suggestion.json"
            if not path.exists():
                found = suggest_guidance_layer(self.model, self.formatter, self.targets, self.rows["train"])
                write_json(path, asdict(found))
            suggestion = read_record(path, *sizes)
            sizes = {name: suggestion[name] if size is None else size for name, size in sizes.items()}
        same = ("bridge_heads", "correction", "step", "conditional", "injection", "attribute")
        return GuidanceModuleConfig(
            hidden_size=self.model.config.get_text_config(decoder=True).hidden_size,
            backbone=manifest["backbone"],
            backbone_fingerprint=manifest["backbone_fingerprint"],
            chat_template=manifest["chat_template"],
            **sizes,
            **{name: getattr(arguments, name) for name in same},
        )

    def run(self) -> dict[str, dict[str, float]]:
        """All stages; metrics of each on the validation prompts."""
        arguments, metrics = self.arguments, {}
        self.module.set_statistics(*statistics(LabelledStates(self.states, self.targets, self.rows["train"])))
        for stage in STAGES:
            if stage == "pair" and not arguments.conditional:
                continue
            if stage == "bridge":
                self._set_threshold()
            done = self.work / f"{stage}.json"
            if done.exists():
                self.module.load_state_dict(torch.load(self.work / f"{stage}.pt", weights_only=True))
            else:
                result = self._stage(stage)
                torch.save(self.module.state_dict(), self.work / f"{stage}.pt")
                write_json(done, result)
            metrics[stage] = read_record(done)
        self.module.requires_grad_(True)
        self.module.eval()
        return metrics

    def _stage(self, stage: str) -> dict[str, float]:
        set_seed(self.arguments.seed)
        trainer = self._bridge_trainer() if stage == "bridge" else self._value_trainer(stage)
        (self.work / stage).mkdir(exist_ok=True)
        train_on(trainer)
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        if not math.isfinite(evaluated["eval_loss"]):
            raise ValueError(f"Stage {stage!r}: the validation loss is not finite: lower `{stage}_rate`.")
        kept = ("loss", "auroc", "accuracy", "f1", "captured", *PARTS)
        return {name: round(evaluated[f"eval_{name}"], 4) for name in kept if f"eval_{name}" in evaluated}

    def _value_trainer(self, stage: str) -> Trainer:
        arguments, paired = self.arguments, stage == "pair"
        rate = arguments.pair_rate if paired else arguments.text_rate
        epochs = arguments.pair_epochs if paired else arguments.text_epochs
        datasets = (LabelledStates(self.states, self.targets, self.rows[name]) for name in ("train", "validation"))
        training, validation = datasets
        return ValueStageTrainer(
            model=ValueStage(self.module, paired),
            slow=arguments.pair_slow_rate if paired else None,
            args=self._training_arguments(stage, rate, epochs),
            train_dataset=training,
            eval_dataset=validation,
        )

    def _bridge_trainer(self) -> Trainer:
        arguments = self.arguments
        moments = GuidedMoments(self.model, self.module, arguments.moments, arguments.neutral_when_safe)
        with torch.no_grad():
            self.module.generator.raw_gate.fill_(arguments.gate)
        judged = Targets(self.collection, [arguments.judge], "hazard")
        disliked = disliked_tokens(judged, self.rows["train"], self.model.get_output_embeddings().weight.shape[0])
        order = torch.randperm(len(self.rows["train"]), generator=torch.Generator().manual_seed(arguments.seed))
        rows = [self.rows["train"][index] for index in order[: arguments.bridge_rows].tolist()]
        return BridgeStageTrainer(
            model=BridgeStage(moments, arguments, disliked),
            collate=ResponseBatch(self.targets, self.formatter),
            args=self._training_arguments("bridge", arguments.bridge_rate, arguments.bridge_epochs),
            train_dataset=Responses(judged, rows),
            eval_dataset=Responses(judged, self.rows["validation"]),
        )

    def _set_threshold(self) -> None:
        """Let the module be content with all but the asked share of tokens of the validation prompts."""
        if self.arguments.guided_share is None:
            return
        values = []
        dataset = LabelledStates(self.states, self.targets, self.rows["validation"])
        self.module.eval()
        with torch.no_grad():
            for index in range(len(dataset)):
                batch = join_states([dataset[index]])
                values.append(self.module(**batch).value.flatten())
        threshold = torch.cat(values).quantile(1 - self.arguments.guided_share).item()
        self.module.config.threshold = min(max(threshold, 1e-4), 1 - 1e-4)

    def _training_arguments(self, stage: str, rate: float, epochs: int) -> TrainingArguments:
        return training_arguments(
            self.work / stage,
            self.arguments.batch_rows,
            self.arguments.seed,
            self.arguments.trainer,
            num_train_epochs=epochs,
            learning_rate=rate,
            weight_decay=1e-5,
            warmup_steps=0.05,
            save_total_limit=1,
            logging_steps=10,
            label_names=["labels"] if stage != "bridge" else ["input_ids"],
        )


def statistics(dataset: LabelledStates, most: int = 1000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the states, `(width,)` each, of at most so many rows."""
    states = torch.cat([dataset[index]["states"].float() for index in range(min(most, len(dataset)))])
    return states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
