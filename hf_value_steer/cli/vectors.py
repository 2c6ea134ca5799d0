"""`hf-value-steer vectors extract | scale | sweep | apply | bake`: steering vectors, one command a step."""

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.activation.interop import vectors_from_file
from hf_value_steer.activation.residual import layer_range
from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.arguments.base import BackboneArguments, SamplingArguments
from hf_value_steer.arguments.evaluate import SweepArguments
from hf_value_steer.backbone.parts import num_layers
from hf_value_steer.cli.command import add_command
from hf_value_steer.evaluation.sweep import sweep
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, load_prompts
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.vectors import vectors_from_collection, vectors_from_pairs, vectors_from_value_head


@dataclass(kw_only=True)
class ModelArguments(BackboneArguments):
    """The model that the vectors are of."""

    chat: bool = field(default=False, metadata={"help": "put texts into the model's chat template"})

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_backbone(self.model, self.dtype, PartialState().device)

    def encoded(self, tokenizer: PreTrainedTokenizerBase, source: str) -> list[list[int]]:
        """Token ids of the texts of a file."""
        formatter = Formatter(tokenizer, self.chat)
        return [formatter([prompt])["input_ids"][0].tolist() for prompt in load_prompts(source)]


@dataclass(kw_only=True)
class ExtractArguments(ModelArguments):
    """From `positive` and `negative`, from a labelled `collection`, from a `value_head`, or from a file of vectors."""

    output: str = field(metadata={"help": "folder of the vectors"})
    positive: str | None = field(default=None, metadata={"help": "texts with the attribute, as prompts of `collect`"})
    negative: str | None = field(default=None, metadata={"help": "texts without it"})
    collection: str | None = field(default=None, metadata={"help": "folder that `collect` wrote"})
    judge: str | None = field(default=None, metadata={"help": "whose labels of the collection to go by"})
    value_head: str | None = field(default=None, metadata={"help": "folder or Hub id of a head"})
    texts: str | None = field(default=None, metadata={"help": "texts on which the head's gradient is taken"})
    vectors: str | None = field(default=None, metadata={"help": "a .gguf or .safetensors file to import"})
    method: str = field(default="mean_difference", metadata={"help": "mean_difference, pca or logistic"})
    pooling: str | None = field(default=None, metadata={"help": "last (of pairs the default) or mean"})
    layers: list[float] = field(default_factory=lambda: [0.4, 0.9], metadata={"help": "range, as shares of the depth"})
    attribute: str | None = field(default=None, metadata={"help": "what a positive multiplier brings more of"})


@dataclass(kw_only=True)
class ScaleArguments(ModelArguments):
    """Strengths that follow the norm of the residual stream; the folder is changed in place."""

    vectors: str = field(metadata={"help": "folder of the vectors"})
    texts: str = field(metadata={"help": "a few dozen texts, as prompts of `collect`"})
    rho: float | None = field(
        default=None, metadata={"help": "relative influence at m = 1; 1/sqrt(width) if left out"}
    )


@dataclass(kw_only=True)
class ApplyArguments(ModelArguments, SamplingArguments):
    """Continue prompts with and without the vectors."""

    vectors: str = field(metadata={"help": "folder or Hub id of the vectors"})
    prompts: str = field(metadata={"help": "as for `collect`"})
    multipliers: list[float] = field(default_factory=lambda: [-0.25, 0.25], metadata={"help": "which to show"})
    mode: str = field(default="broadcast", metadata={"help": "broadcast or last_token"})
    max_new_tokens: int = field(default=64, metadata={"help": "length of a text"})
    seed: int = field(default=0, metadata={"help": "of sampling"})


@dataclass(kw_only=True)
class BakeArguments(ModelArguments):
    """Write a checkpoint that is steered by itself."""

    vectors: str = field(metadata={"help": "folder or Hub id of the vectors"})
    multiplier: float = field(metadata={"help": "how much of them; `sweep` says how far it can go"})
    output: str = field(metadata={"help": "folder of the checkpoint"})
    texts: str | None = field(default=None, metadata={"help": "texts to compare on; random tokens if left out"})


def add_vectors(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    summary = "steering vectors: directions of the residual stream"
    parser = commands.add_parser("vectors", help=summary, description=__doc__)
    steps = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, function, kind in (
        ("extract", "directions from texts, labelled generations or a value head", _extract, ExtractArguments),
        ("scale", "strengths from the norms of the model", _scale, ScaleArguments),
        ("sweep", "which multipliers work, by judges and perplexity", _sweep, SweepArguments),
        ("apply", "texts with and without the vectors", _apply, ApplyArguments),
        ("bake", "a checkpoint that carries the vectors in its weights", _bake, BakeArguments),
    ):
        aliases = ("calibrate",) if name == "scale" else ()
        add_command(steps, name, summary, function, kind, description=kind.__doc__, aliases=aliases)


def _extract(arguments: ExtractArguments) -> None:
    model, tokenizer = arguments.load()
    layers = layer_range(num_layers(model), *arguments.layers)
    how: dict[str, Any] = {"layers": layers, "attribute": arguments.attribute, "method": arguments.method}
    how |= {"pooling": arguments.pooling} if arguments.pooling else {}
    match arguments:
        case ExtractArguments(positive=str(positive), negative=str(negative)):
            sides = ([prompt.text for prompt in load_prompts(source)] for source in (positive, negative))
            vectors = vectors_from_pairs(model, tokenizer, *sides, **how)
        case ExtractArguments(collection=str(folder), judge=str(judge)):
            vectors = vectors_from_collection(model, tokenizer, Collection(folder), judge, **how)
        case ExtractArguments(value_head=str(head), texts=str(texts)):
            sequences = arguments.encoded(tokenizer, texts)
            vectors = vectors_from_value_head(model, ValueHead.from_pretrained(head), sequences, layers=layers)
        case ExtractArguments(vectors=str(file)):
            vectors = vectors_from_file(file, attribute=arguments.attribute, backbone=arguments.model)
            vectors.check_fit(model)
        case _:
            raise ValueError(
                "Pass --positive and --negative, --collection and --judge, --value-head and --texts, or --vectors."
            )
    vectors.save_pretrained(arguments.output)
    print(f"{arguments.output}: layers {vectors.layers[0]} to {vectors.layers[-1]}, not scaled yet")


def _scale(arguments: ScaleArguments) -> None:
    model, tokenizer = arguments.load()
    sequences = arguments.encoded(tokenizer, arguments.texts)
    vectors = SteeringVectors.from_pretrained(arguments.vectors).scale(model, sequences, arguments.rho)
    vectors.save_pretrained(arguments.vectors)
    for layer, strength in zip(vectors.layers, vectors.strengths.tolist(), strict=True):
        print(f"layer {layer:<4}strength at m = 1 {strength:.4g}")


def _sweep(arguments: SweepArguments) -> None:
    document = sweep(arguments)
    for run in document["runs"]:
        rates = "  ".join(f"{name} {100 * judge['rate']:.1f} %" for name, judge in run["judges"].items())
        note = "  collapsed" if run["collapsed"] else ""
        print(f"m {run['multiplier']:<6g}{rates}  perplexity x{run['perplexity_ratio']:.3g}{note}")
    print(f"window: {document['window'][0]:g} to {document['window'][1]:g}")


def _apply(arguments: ApplyArguments) -> None:
    model, tokenizer = arguments.load()
    vectors = SteeringVectors.from_pretrained(arguments.vectors)
    formatter = Formatter(tokenizer, arguments.chat)
    for prompt in load_prompts(arguments.prompts):
        inputs = formatter([prompt], model.device)
        print(f"\n{prompt.text}")
        for multiplier in (0.0, *arguments.multipliers):
            torch.manual_seed(arguments.seed)
            options = {**arguments.sampling(), "max_new_tokens": arguments.max_new_tokens}
            with vectors.apply(model, multiplier, arguments.mode):  # type: ignore[arg-type]
                output = model.generate(**inputs, **options)
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  m {multiplier:<6g}{' '.join(text.split())}")


def _bake(arguments: BakeArguments) -> None:
    model, tokenizer = arguments.load()
    sequences = arguments.encoded(tokenizer, arguments.texts) if arguments.texts else None
    vectors = SteeringVectors.from_pretrained(arguments.vectors)
    report = vectors.bake(model, arguments.multiplier, arguments.output, sequences=sequences, tokenizer=tokenizer)
    print(json.dumps(report, indent=2))
    if report["kind"] == "custom code":
        print("No plain export of this family is exact: load this checkpoint with trust_remote_code=True.")
