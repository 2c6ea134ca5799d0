"""`collect`: continue prompts, and keep what a value head will see while text is generated."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.kinds import shown
from hf_value_steer.backbone.features import FINAL, ONLY_FINAL, Layer, collected, features_width, resolve_layers
from hf_value_steer.backbone.parts import fingerprint, num_layers
from hf_value_steer.files.reading import refuse_misspelt
from hf_value_steer.files.references import PREFIX, model_name
from hf_value_steer.files.writing import claim, refuse_other
from hf_value_steer.hosts.transformers import attention_of
from hf_value_steer.judges import check_judges
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.progress import progress
from hf_value_steer.training.continuation import Batch, Continuation, Start, seed_of, shard_tensors, until_end
from hf_value_steer.training.forced_words import ForcedWords
from hf_value_steer.training.label import label
from hf_value_steer.training.prompts import Formatter, load_prompts, prompts_digest, read_records, write_prompts
from hf_value_steer.training.sampling import generate_arguments
from hf_value_steer.training.shards import FORMAT, Collection, TensorFile, shard_path, write_tensors


logger = logging.getLogger(__name__)


def load_backbone(model: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Backbone and tokenizer; `model` is a folder, a Hub id, or a `python:` reference to a function that gives one."""
    name = model_name(model)
    refuse_misspelt(name, "model")
    backbone = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return backbone, AutoTokenizer.from_pretrained(name)


def collect(
    arguments: CollectArguments, labels: LabelArguments | None = None, serve: Start | None = None
) -> Collection:
    """Generate, keep every token's feature at decode time, and label.

    Goes on where it was stopped: a shard is there completely or not at all, and its random numbers depend on the seed
    and its index alone, so an interrupted collection becomes the same, byte by byte. Under `accelerate launch` the
    processes share the shards. With `engine="vllm"` the prompts are continued by vLLM, in this process, and the
    features are those that its model runner sees, which a steered server scores. Prompts, words and judges are looked
    at before the backbone is loaded.

    Args:
        arguments: what to generate.
        labels (*optional*): which judges read the generations, see [`~hf_value_steer.training.label`].
        serve (*optional*): starts the engine of `engine="vllm"`: [`~hf_value_steer.vllm.start.vllm_engine`]. The
            command line and recipes pass it.

    Returns:
        The collection, complete.

    Raises:
        ImportError: if vLLM is asked for and not installed.
        ValueError: for anything that cannot be done, and if the folder holds another collection.
    """
    state, folder = PartialState(), Path(arguments.output)
    prompts = load_prompts(arguments.prompts, arguments.prompt_column, arguments.prompt_split, arguments.limit)
    asked = {"arguments": _recorded(arguments), "prompts_sha256": prompts_digest(prompts)}
    refuse_other(folder / "collection.json", asked)
    words = _words(arguments.force_words) if arguments.force_words else []
    if labels is not None:
        check_judges(labels.judges, prompts)
    continuation = _start(arguments, state, prompts, words, serve)
    batches = list(_batches(arguments, prompts))
    with state.main_process_first():
        claim(folder / "collection.json", {**asked, **_manifest(arguments, continuation, len(batches))})
        write_prompts(prompts, folder / "prompts.jsonl")
    # Shared out first, then checked: what others write meanwhile must not change what is ours.
    mine = batches[state.process_index :: state.num_processes]
    missing = [batch for batch in mine if not _is_complete(shard_path(folder, batch.index))]
    for batch in progress(missing, "collect", "shard", not state.is_main_process):
        write_tensors(shard_path(folder, batch.index), continuation.tensors(batch))
    state.wait_for_everyone()
    collection = Collection(folder)
    if labels is not None:
        label(collection, continuation.formatter.tokenizer, labels)
    return collection


def _batches(arguments: CollectArguments, prompts: Sequence[Prompt]) -> Iterator[Batch]:
    index = 0
    for samples, forced in ((arguments.samples, False), (arguments.forced_samples, True)):
        for first in range(0, len(prompts) if samples else 0, arguments.batch_size):
            yield Batch(index, prompts[first : first + arguments.batch_size], first, samples, forced)
            index += 1


def _start(
    arguments: CollectArguments,
    state: PartialState,
    prompts: Sequence[Prompt],
    words: Sequence[str],
    serve: Start | None,
) -> Continuation:
    if arguments.engine == "generate":
        return _Generate(arguments, state.device, words)
    if state.num_processes > 1:
        raise ValueError("vLLM shares the work itself: run `collect` as one process, with `tensor_parallel_size`.")
    if serve is None:
        raise ValueError('`engine="vllm"` needs what starts it: pass `serve=hf_value_steer.vllm.start.vllm_engine`.')
    return serve(arguments, prompts)


def _recorded(arguments: CollectArguments) -> dict[str, Any]:
    recorded = {name: choice for name, choice in asdict(arguments).items() if name != "output"}
    if arguments.engine == "generate":  # as before there was another one
        del recorded["engine"], recorded["engine_args"]
    if arguments.feature_layers == [FINAL]:
        del recorded["feature_layers"]
    return recorded


def _manifest(arguments: CollectArguments, continuation: Continuation, shards: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "sampling": arguments.sampling(),
        "shards": shards,
        "backbone": arguments.backbone or arguments.model,
        "chat_template": continuation.formatter.name,
        **continuation.facts,
    }


def _is_complete(path: Path) -> bool:
    """Whether a shard is there; a damaged one is made anew."""
    if not path.exists():
        return False
    try:
        TensorFile(path).verify()
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return True


class _Generate:
    """`generate` of transformers as a [`Continuation`]."""

    def __init__(self, arguments: CollectArguments, device: torch.device, words: Sequence[str]):
        self.arguments = arguments
        self.model, tokenizer = load_backbone(arguments.model, arguments.dtype, device)
        self.formatter = Formatter(tokenizer, arguments.chat)
        self.words = ForcedWords(self.model, tokenizer, words) if words else None
        self.layers = _layers(arguments.feature_layers, self.model)
        self.facts = {
            "backbone_fingerprint": fingerprint(self.model),
            "hidden_size": features_width(self.model, self.layers),
            "feature_dtype": str(self.model.dtype).removeprefix("torch."),
            "kernel": f"decode, {attention_of(self.model.config)}",
            "backend": f"transformers {version('transformers')}, torch {version('torch')}",
        }
        if self.layers != ONLY_FINAL:
            self.facts |= {"feature_layers": list(self.layers), "num_layers": num_layers(self.model)}

    @torch.no_grad()
    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(seed_of(self.arguments.seed, batch.index))
        inputs = self.formatter(batch.prompts, self.model.device)
        length, rows = inputs["input_ids"].shape[1], len(batch.prompts) * batch.samples
        watch = _Watch(self.words if batch.forced else None, self.arguments, rows, length)
        with collected(self.model, self.layers, lambda state: state[:, -1].cpu()) as features:
            # A token's feature appears when the next token is about to be chosen: one more is drawn than is kept.
            sequences = self.model.generate(
                **inputs,
                **generate_arguments(self.arguments.sampling(), watch),
                num_return_sequences=batch.samples,
                max_new_tokens=self.arguments.max_new_tokens + 1,
            )
        tokens = sequences[:, length:-1].cpu()
        keep = until_end(tokens, self.model.generation_config.eos_token_id)
        states = {layer: torch.stack([step[layer] for step in features[1:]], dim=1) for layer in self.layers}
        return shard_tensors(batch, keep, {"tokens": tokens.int(), **watch.columns()}, states, features[0])


def _layers(places: list[Any], model: PreTrainedModel) -> tuple[Layer, ...]:
    """The layers to keep, in the order in which they are asked for."""
    return (*range(num_layers(model)), FINAL) if places == ["all"] else resolve_layers(places, model)


def _words(source: str) -> list[str]:
    if not source.startswith(PREFIX):
        return [prompt.text for prompt in load_prompts(source, argument="force_words")]
    words = []
    for place, word in read_records(source, argument="force_words"):
        if not isinstance(word, str):
            raise ValueError(f"`force_words`: {place}: a word has to be a text, got {shown(word)}.")
        words.append(word)
    if not words:
        raise ValueError(f"`force_words`: {source} gave no word.")
    return words


class _Watch(LogitsProcessor):  # type: ignore[misc]
    """Keeps the most likely next tokens of every step, and forces two words into every row if there are any.

    A word begins at a random step of each half of the generation; a generation of one token is one half.
    """

    def __init__(self, words: ForcedWords | None, arguments: CollectArguments, rows: int, prompt_length: int):
        self.words, self.keep, self.prompt_length = words, arguments.next_tokens, prompt_length
        self.pending: list[list[int]] = [[] for _ in range(rows)]
        half, draw = arguments.max_new_tokens // 2, random.Random(torch.initial_seed())
        step = max(half, 1)
        self.starts = [{draw.randrange(step), half + draw.randrange(step)} for _ in range(rows)]
        self.likely: list[tuple[Tensor, Tensor]] = []
        self.forced: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.keep:
            probabilities, tokens = scores.softmax(-1).topk(self.keep)
            self.likely.append((probabilities.half().cpu(), tokens.int().cpu()))
        step = input_ids.shape[1] - self.prompt_length
        for row, starts in enumerate(self.starts):
            if self.words is not None and step in starts:
                self.pending[row] = self.words.draw(scores[row])
        if self.words is not None:
            self.forced.append(torch.tensor([bool(pieces) for pieces in self.pending]))
        if not any(self.pending):
            return scores
        scores = scores.clone()
        for row, pieces in enumerate(self.pending):
            if pieces:
                scores[row] = -torch.inf
                scores[row, pieces.pop(0)] = 0.0
        return scores

    def columns(self) -> dict[str, Tensor]:
        """What came next after each kept token, `(rows, steps, next_tokens)`; which were forced, `(rows, steps)`."""
        columns = {"forced": torch.stack(self.forced[:-1], dim=1)} if self.forced else {}
        if not self.keep:
            return columns
        probabilities, tokens = (torch.stack(steps, dim=1) for steps in zip(*self.likely[1:], strict=True))
        return {**columns, "next_probabilities": probabilities, "next_tokens": tokens}
