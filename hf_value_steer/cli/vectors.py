"""`vectors extract`, `scale`, `sweep`, `apply`, `bake`: steering vectors, one command a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.activation.interop import vectors_from_file
from hf_value_steer.activation.residual import layer_range
from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.arguments.evaluate import SweepArguments
from hf_value_steer.arguments.vectors import (
    ApplyArguments,
    BakeArguments,
    ExtractArguments,
    ModelArguments,
    ScaleArguments,
)
from hf_value_steer.backbone.parts import num_layers
from hf_value_steer.evaluation.sweep import sweep
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, load_prompts
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.vectors import vectors_from_collection, vectors_from_pairs, vectors_from_value_head


def _load(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_backbone(arguments.model, arguments.dtype, PartialState().device)


def _encoded(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Prompt]
) -> list[list[int]]:
    """Token ids of some texts."""
    formatter = Formatter(tokenizer, arguments.chat)
    return [formatter([text])["input_ids"][0].tolist() for text in texts]


def extract(arguments: ExtractArguments) -> None:
    """Find directions, and save them."""
    names = ("positive", "negative", "texts")
    read = {name: load_prompts(file, argument=name) for name in names if (file := getattr(arguments, name))}
    model, tokenizer = _load(arguments)
    layers = layer_range(num_layers(model), *arguments.layers)
    how: dict[str, Any] = {"layers": layers, "attribute": arguments.attribute, "method": arguments.method}
    how |= {"pooling": arguments.pooling} if arguments.pooling else {}
    match arguments:
        case ExtractArguments(positive=str(), negative=str()):
            sides = ([prompt.text for prompt in read[name]] for name in names[:2])
            vectors = vectors_from_pairs(model, tokenizer, *sides, chat=arguments.chat, **how)
        case ExtractArguments(collection=str(folder), judge=str(judge)):
            vectors = vectors_from_collection(model, tokenizer, Collection(folder), judge, **how)
        case ExtractArguments(value_head=str(head), texts=str()):
            sequences = _encoded(arguments, tokenizer, read["texts"])
            vectors = vectors_from_value_head(model, ValueHead.from_pretrained(head), sequences, layers=layers)
        case _:
            vectors = vectors_from_file(
                str(arguments.vectors), attribute=arguments.attribute, backbone=arguments.model
            )
            vectors.check_fit(model)
    vectors.save_pretrained(arguments.output)
    print(f"{arguments.output}: layers {vectors.layers[0]} to {vectors.layers[-1]}, not scaled yet. Next:")
    print(f"  hf-value-steer vectors scale --model {arguments.model} --vectors {arguments.output} --texts TEXTS")


def scale(arguments: ScaleArguments) -> None:
    """Set the strengths, and print them."""
    texts = load_prompts(arguments.texts, argument="texts")
    model, tokenizer = _load(arguments)
    sequences = _encoded(arguments, tokenizer, texts)
    vectors = SteeringVectors.from_pretrained(arguments.vectors).scale(model, sequences, arguments.rho)
    vectors.save_pretrained(arguments.vectors)
    for layer, strength in zip(vectors.layers, vectors.strengths.tolist(), strict=True):
        print(f"layer {layer:<4}strength at m = 1 {strength:.4g}")


def sweep_command(arguments: SweepArguments) -> None:
    """Sweep, and print a line for each multiplier, and the window."""
    document = sweep(arguments)
    for run in document["runs"]:
        rates = "  ".join(f"{name} {100 * judge['rate']:.1f} %" for name, judge in run["judges"].items())
        note = f"  {run['collapsed']}" if run["collapsed"] else ""
        print(f"m {run['multiplier']:<6g}{rates}  perplexity x{run['perplexity_ratio']:.3g}{note}")
    print(f"window: {document['window'][0]:g} to {document['window'][1]:g}")
    print(f"{Path(arguments.output) / 'sweep.html'} shows it, with texts.")


def apply(arguments: ApplyArguments) -> None:
    """Print each prompt's texts, unsteered and under each multiplier."""
    prompts = load_prompts(arguments.prompts, limit=arguments.limit)
    vectors = SteeringVectors.from_pretrained(arguments.vectors)
    model, tokenizer = _load(arguments)
    formatter = Formatter(tokenizer, arguments.chat)
    for prompt in prompts:
        inputs = formatter([prompt], model.device)
        print(f"\n{prompt.text}")
        for multiplier in (0.0, *arguments.multipliers):
            torch.manual_seed(arguments.seed)
            options = {**arguments.sampling(), "max_new_tokens": arguments.max_new_tokens}
            with vectors.apply(model, multiplier, arguments.mode):
                output = model.generate(**inputs, **options)
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  m {multiplier:<6g}{' '.join(text.split())}")


def bake(arguments: BakeArguments) -> None:
    """Write the checkpoint, and say how near it is to the steered model."""
    texts = load_prompts(arguments.texts, argument="texts") if arguments.texts else []
    model, tokenizer = _load(arguments)
    sequences = _encoded(arguments, tokenizer, texts) or None
    vectors = SteeringVectors.from_pretrained(arguments.vectors)
    report = vectors.bake(model, arguments.multiplier, arguments.output, sequences=sequences, tokenizer=tokenizer)
    print(
        f"{arguments.output}: {report['kind']}, in {report['dtype']}; steering changes logits by up to "
        f"{report['max_logit_change']:.3g}, baking by up to {report['max_logit_difference']:.3g} more or less; "
        f"{100 * report['same_greedy_tokens']:.4g} % of the greedy tokens are those of the steered model. "
        "All of it is in steering/report.json."
    )
    if report["kind"] == "custom code":
        print("No plain export of this family is exact: load this checkpoint with trust_remote_code=True.")
