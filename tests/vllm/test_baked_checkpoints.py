"""vLLM runs checkpoints into which vectors were baked, as what they are: plain ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from hf_value_steer import SteeringVectors
from tests.vllm import tiny
from tests.vllm.helpers import run, tokens


MULTIPLIER, NEW_TOKENS = 4.0, 16
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
}


def _greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    texts = [model.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in prompts]
    return [text[-NEW_TOKENS:] for text in texts]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_greedy_tokens_as_the_steered_model(engine: Callable[..., Any], tmp_path: Path, shape: str) -> None:
    from vllm import SamplingParams

    kind, options = SHAPES[shape]
    model, prompts = tiny.build(kind, **options), tiny.prompts(8)
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(tiny.WIDTH, generator=generator) for layer in range(2)}
    vectors = SteeringVectors.from_tensors(directions).scale(model, prompts)
    vectors.bake(model, MULTIPLIER, tmp_path / "baked")
    with vectors.apply(model, MULTIPLIER):
        steered = _greedy(model, prompts)
    llm = engine(model=tmp_path / "baked", skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, detokenize=False)
    assert tokens(run(llm, prompts, [params] * len(prompts))) == steered
    assert all(mine != plain for mine, plain in zip(steered, _greedy(model, prompts), strict=True))
