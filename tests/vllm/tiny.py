"""A tiny model that vLLM runs on a CPU, its tokenizer of words, and heads for it, as folders."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_value_steer import ValueHead, ValueHeadConfig


VOCABULARY, WIDTH, EOS = 187, 96, 2  # 187, padded to 192, and six heads: two ranks share them, and three do
SIZES = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def build(kind: type[PreTrainedConfig] = LlamaConfig, **options: Any) -> PreTrainedModel:
    """Weights large enough that the next-token distribution is far from uniform, and EOS is rare but possible."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **options), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
    return model


def save(folder: Path) -> Path:
    """Write model and tokenizer."""
    build().save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS, **{f"Ġw{index}": index for index in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    return folder


def save_head(folder: Path, kind: str, polarity: str = "undesirable") -> str:
    """Write a head: `"spread"` has values over (0, 1), `"accepting"` 0.5 whatever it reads."""
    torch.manual_seed(7)
    head = ValueHead(ValueHeadConfig(hidden_size=WIDTH, polarity=polarity, threshold=0.5))
    with torch.no_grad():
        head.net[-1].weight.mul_(8.0 if kind == "spread" else 0.0)
        head.net[-1].bias.zero_()
    target = folder / f"{kind}-{polarity}"
    head.save_pretrained(target)
    return str(target)


def prompts(count: int, shortest: int = 3, longest: int = 40) -> list[list[int]]:
    """Token ids of `count` different prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
