"""A tiny model with a tokenizer of words, saved as a folder: for tests that go from prompts to files."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_value_steer import enable_value_steer
from tests.families import VOCABULARY, build


LETTERS = [one + two for one in "abcdefghij" for two in "klmnopqrst"]
BAD = [f"bad{letters}" for letters in LETTERS[:8]]
GOOD = [f"good{letters}" for letters in LETTERS[: VOCABULARY - 3 - len(BAD)]]


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer; words are `goodak`, ... and `badak`, ..., and the model says both."""
    model = build("llama", seed=seed)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *BAD, *GOOD]
    # Words carry the space before them, as byte-level tokenizers do it.
    vocabulary = {word if word.startswith("<") else f"Ġ{word}": index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int) -> Path:
    """`count` different prompts of two to four good words."""
    lines = [" ".join(GOOD[(7 * index + step) % len(GOOD)] for step in range(2 + index % 3)) for index in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_lexicon(path: Path) -> Path:
    path.write_text("\n".join(BAD) + "\n", encoding="utf-8")
    return path


def write_world(folder: Path, prompts: int = 40) -> Path:
    """A tiny model, prompts, others, and a word list in a folder: `model/`, `prompts.txt`, `unseen.txt`, `bad.txt`."""
    save_tiny_model(folder / "model")
    known = write_prompts(folder / "prompts.txt", prompts).read_text(encoding="utf-8")
    # Other prompts by their text, of the same tokens: so few of them teach a head only what it has seen.
    (folder / "unseen.txt").write_text(known.replace(" ", "  "), encoding="utf-8")
    write_lexicon(folder / "bad.txt")
    return folder


def continued(folder: Path, prompt: str, value_steer: Any = None, tokens: int = 12, seed: int = 0) -> str:
    """The text that `generate` itself continues a prompt with; sampled from all tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    enable_value_steer(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "value_steer": value_steer}
    return str(tokenizer.decode(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]))
