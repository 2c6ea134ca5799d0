"""Labels: what judges say of collected generations, of whole ones and of every prefix."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_value_steer.arguments.collect import LabelArguments
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.references import model_name
from hf_value_steer.files.writing import claim, write_json
from hf_value_steer.judges import Judge, agreement, load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.progress import progress
from hf_value_steer.training.shards import Collection, TensorFile, write_tensors


def label(collection: Collection, tokenizer: PreTrainedTokenizerBase, arguments: LabelArguments) -> dict[str, Any]:
    """Let judges score a collection. Labels that are there already are kept.

    Of each generation the score of the whole response; with `prefixes` also of the response up to each token, and, if
    the collection kept the most likely next tokens, up to each of those.

    Returns:
        What each judge said on average, those that were asked before included; how many of its answers could not be
        read or texts had to be cut; and how far judges agree, see [`~hf_value_steer.judges.agreement`]. The
        same is in `labels/report.json`.

    Raises:
        RuntimeError: if a judge fails. What was labelled stays, by shards.
        ValueError: if a judge is missing or answers out of range. What was labelled stays.
    """
    state = PartialState()
    pieces = None
    for spec in arguments.judges:
        judge, folder = load_judge(spec), labels_folder(collection, spec)
        how = {"prefixes": arguments.prefixes, "prefix_words": arguments.prefix_words, "digest": judge.digest}
        claim(folder / "labels.json", {"judge": spec, **how})
        mine = range(len(collection.shards))[state.process_index :: state.num_processes]
        missing = [index for index in mine if not _file(folder, index).exists()]
        if arguments.prefixes and missing and pieces is None:
            pieces = vocabulary_pieces(tokenizer)
        reader = _Reader(collection, tokenizer, judge, arguments, pieces)
        for index in progress(missing, f"label {spec}", "shard", not state.is_main_process):
            try:
                write_tensors(_file(folder, index), reader.tensors(index))
            except RuntimeError as error:
                raise RuntimeError(f"{error} (what is labelled stays: run it again for the rest)") from error
    state.wait_for_everyone()
    labels = {spec: Labels(collection, spec) for spec in _complete(collection)}
    scores = {spec: each.responses().numpy() for spec, each in labels.items()}
    report = {
        "judges": {spec: {"mean": float(scores[spec].mean()), **labels[spec].troubles()} for spec in labels},
        "agreement": agreement(scores),
    }
    write_json(collection.folder / "labels" / "report.json", report)
    return report


def _complete(collection: Collection) -> list[str]:
    """The judges that have read all of a collection, by name."""
    records = sorted((collection.folder / "labels").glob("*/labels.json"))
    whole = [path for path in records if len(list(path.parent.glob("*.safetensors"))) == len(collection.shards)]
    return sorted(str(read_record(path, "judge")["judge"]) for path in whole)


def tokenizer_of(collection: Collection) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone that wrote a collection, from where the backbone was loaded."""
    return AutoTokenizer.from_pretrained(model_name(collection.manifest["arguments"]["model"]))


class Labels:
    """What one judge said of a collection.

    Raises:
        ValueError: if the judge did not read all of it.
    """

    def __init__(self, collection: Collection, judge: str):
        folder = labels_folder(collection, judge)
        paths = [_file(folder, index) for index in range(len(collection.shards))]
        if missing := sum(not path.exists() for path in paths):
            raise ValueError(f"{judge} has not labelled {missing} of {len(paths)} shards: run `collect` with it.")
        self.collection, self.files = collection, [TensorFile(path) for path in paths]

    def digest(self) -> str:
        """What tells these labels from others."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def responses(self) -> Tensor:
        """Scores of whole responses, `(rows,)`."""
        return torch.cat([file.read("responses") for file in self.files])

    def troubles(self) -> dict[str, int]:
        """How many answers could not be read, and how many texts were cut."""
        unparseable, truncated = torch.stack([file.read("troubles") for file in self.files]).sum(dim=0).tolist()
        return {"unparseable": unparseable, "truncated": truncated}

    @property
    def kinds(self) -> set[str]:
        """`"responses"`, and with prefixes `"prefixes"`, `"completes"` and perhaps `"next"`."""
        return set(self.files[0].tensors)

    def read(self, name: str, row: int) -> Tensor:
        """Of a row's tokens, scores (`"prefixes"`, `"next"`) or whether they complete a word: `(tokens, ...)`."""
        return self.collection.read_from(self.files, name, row)


def labels_folder(collection: Collection, judge: str) -> Path:
    """Where a judge's labels lie; the name says which it is, the digest tells similar ones apart."""
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", judge).strip("-")[-40:]
    return collection.folder / "labels" / f"{slug}-{hashlib.sha256(judge.encode()).hexdigest()[:8]}"


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def vocabulary_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token of the vocabulary adds to a text: decoded after a word, where no space is dropped."""
    tokens = range(len(tokenizer))
    word = next(token for token in tokens if tokenizer.decode([token], skip_special_tokens=True).strip().isalnum())
    alone = len(tokenizer.decode([word]))
    return [text[alone:] for text in tokenizer.batch_decode([[word, t] for t in tokens], skip_special_tokens=True)]


def completes_word(pieces: Sequence[str]) -> list[bool]:
    """Whether no letter or digit follows a token that ends in one, for each token of a text that was cut anywhere.

    Of the last token that is known only if it does not end in one: a text that was cut may have gone on.
    """
    unknown = "x"  # what follows the last token
    return [
        not (piece[-1:].isalnum() and after[:1].isalnum()) for piece, after in itertools.pairwise([*pieces, unknown])
    ]


@dataclass
class _Reader:
    """One judge reading shards."""

    collection: Collection
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    arguments: LabelArguments
    pieces: list[str] | None

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The labels of one shard."""
        shard = self.collection.shards[index]
        tokens, offsets = shard.read("tokens"), shard.read("offsets").tolist()
        prompts = [self.collection.prompts[prompt] for prompt in shard.read("prompts").tolist()]
        rows = [tokens[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        before = self._troubles()
        labels = {"responses": torch.from_numpy(self.judge(prompts, texts))}
        if self.pieces is not None:
            following = shard.read("next_tokens").tolist() if "next_tokens" in shard.tensors else None
            labels |= self._prefixes(prompts, rows, offsets, following)
        return {**labels, "troubles": self._troubles() - before}

    def _troubles(self) -> Tensor:
        return torch.tensor([self.judge.unparseable, self.judge.truncated])

    def _prefixes(
        self, prompts: Sequence[Prompt], rows: list[list[int]], offsets: list[int], following: list[list[int]] | None
    ) -> dict[str, Tensor]:
        assert self.pieces is not None
        owners, texts, next_texts, completes = [], [], [], list[bool]()
        for prompt, row, start in zip(prompts, rows, offsets, strict=False):
            text, pieces = "", [self.pieces[token] for token in row]
            completes += completes_word(pieces)
            for step, piece in enumerate(pieces):
                text += piece
                owners.append(prompt)
                texts.append(self._cut(text))
                for after in following[start + step] if following else ():
                    next_texts.append(self._cut(text + self.pieces[after]))
        labels = {"prefixes": self._score(owners, texts), "completes": torch.tensor(completes, dtype=torch.bool)}
        if following:
            width = len(following[0])
            repeated = [owner for owner in owners for _ in range(width)]
            labels["next"] = self._score(repeated, next_texts).view(-1, width)
        return labels

    def _cut(self, text: str) -> str:
        words = self.arguments.prefix_words
        return text if words is None else " ".join(text.split()[-words:])

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """Scores, each distinct question asked once."""
        keys = [(id(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        owners = dict(zip(keys, prompts, strict=True))
        scores = self.judge(list(owners.values()), [text for _, text in owners])
        known = dict(zip(owners, scores.tolist(), strict=True))
        return torch.tensor([known[key] for key in keys], dtype=torch.float32)
