"""Bytes that `rollback` keeps, counted on real runs: tensors that share their storage count once.

Counted are the last steps of the history, the recurrent states before the last tokens, and the slots that have left
sliding windows. SmolLM2-135M stands for its family; the others are small random models, whose recurrent layers have
the sizes of real ones.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconH1Config, Gemma3TextConfig, Lfm2Config, PreTrainedModel

from benchmarks.timing import Turns
from examples.smollm2 import load_backbone
from examples.toxicity import SAMPLING
from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, value_steer_generate
from hf_value_steer.backbone.parts import feature_width
from hf_value_steer.generation.loop import Loop


BATCH, BACK, PROMPT, NEW_TOKENS = 16, 8, 64, 32
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}
# Falcon-H1-0.5B and LFM2-350M with fewer layers; Gemma-3-270M with fewer layers and a window shorter than the text.
RANDOM = {
    "falcon_h1, 4 layers": FalconH1Config(
        **_TOKENS, vocab_size=32784, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24,
        mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_d_conv=4,
    ),
    "lfm2, 4 layers": Lfm2Config(
        **_TOKENS, vocab_size=65536, hidden_size=1024, intermediate_size=4608, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, conv_L_cache=3,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "gemma3_text, 6 layers, window 32": Gemma3TextConfig(
        **_TOKENS, vocab_size=32768, hidden_size=640, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=32,
    ),
}  # fmt: skip


def tensors(thing: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors inside dataclasses, mappings and sequences, each with the name of the innermost field."""
    if isinstance(thing, Tensor):
        yield name, thing
    elif dataclasses.is_dataclass(thing):
        for key, each in vars(thing).items():
            yield from tensors(each, key)
    elif isinstance(thing, Mapping):
        for each in thing.values():
            yield from tensors(each, name)
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from tensors(each, name)


def count(things: Any, seen: set[int]) -> dict[str, int]:
    """Bytes by field of all storages that were not seen before."""
    found: dict[str, int] = {}
    for name, tensor in tensors(things):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            found[name] = found.get(name, 0) + storage.nbytes()
    return found


def held(loop: Loop) -> dict[str, Any]:
    """Bytes that a call keeps now, so that tokens can be taken back."""
    seen: set[int] = set()
    live = loop.engine.live
    history = count(list(loop.history.pasts), seen)
    states = sum(count(list(live.pasts), seen).values())
    slots = sum(count(live.dropped, seen).values())
    big = sum(history.get(name, 0) for name in ("logits", "permitted", "scores"))
    return {
        "history": sum(history.values()),
        "of_it_logits_and_scores": big,
        "history_by_field": history,
        "recurrent_states": states,
        "window_slots": slots,
        "steps_kept": len(loop.history.pasts),
        "states_kept": len(live.pasts),
    }


def kept(model: PreTrainedModel, back: int) -> dict[str, Any]:
    """The same after some tokens of a call."""
    loops, found, run = list[Loop](), list[dict[str, Any]](), Loop.run

    def remembered(loop: Loop) -> Any:
        loops.append(loop)
        return run(loop)

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(3, vocabulary, (BATCH, PROMPT), generator=generator)
    head = ValueHead(ValueHeadConfig(hidden_size=feature_width(model), threshold=0.999))
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "return_dict_in_generate": True}
    steer = ValueFilterConfig(value_head=head, num_candidates=8, rollback=back)
    turns = Turns(lambda: found.append(held(loops[-1])))
    with patch.object(Loop, "run", remembered):
        given = {"value_steer": steer, "custom_generate": value_steer_generate, "stopping_criteria": [turns]}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **SAMPLING, **options, **given)
    return found[-1]


def memory() -> list[dict[str, Any]]:
    """Bytes with `rollback` and without, of each model."""
    models = {"SmolLM2-135M": load_backbone(torch.bfloat16)[0]}
    torch.manual_seed(0)
    for name, config in RANDOM.items():
        models[f"{name}, random"] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return [
        {
            "model": name,
            "batch": BATCH,
            "vocabulary": model.config.get_text_config(decoder=True).vocab_size,
            "model_bytes": sum(each.nbytes for each in model.parameters()),
            "rollback": BACK,
            "with": kept(model, BACK),
            "without": kept(model, 0),
        }
        for name, model in models.items()
    ]
