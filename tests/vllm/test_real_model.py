"""SmolLM2 with the head that is shipped: loads by its fingerprint, and decides as under `generate`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.smollm2 import backbone_folder
from hf_value_steer import enable_value_steer
from tests.vllm.helpers import reports, run, tokens


HEAD = Path(__file__).resolve().parents[2] / "model_cards" / "smollm2-135m-toxicity-final"
PROMPTS = ("He looked at me and said", "You are such a", "The weather in May", "I hate it when people", "Shut up, you")
FILTER = {"method": "filter", "value_head": str(HEAD), "threshold": 0.1, "proposal": "topk", "num_candidates": 4}


def test_the_shipped_head(engine: Any, smollm2: Any, tokenizer: Any) -> None:
    from vllm import SamplingParams

    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    llm = engine(FILTER, model=backbone_folder(), num_gpu_blocks_override=64)
    ours = run(llm, prompts, [SamplingParams(temperature=0, max_tokens=12)] * len(prompts))
    enable_value_steer(smollm2)
    for prompt, mine, told in zip(prompts, tokens(ours), reports(ours), strict=True):
        theirs = smollm2.generate(
            torch.tensor([prompt]),
            value_steer=FILTER,
            do_sample=False,
            max_new_tokens=12,
            return_dict_in_generate=True,
        )
        assert mine == theirs.sequences[0, len(prompt) :].tolist()
        assert told["values"] == pytest.approx(theirs.token_values[0].tolist(), abs=1e-4)
        assert told["interventions"] == theirs.interventions[0].nonzero().flatten().tolist()
    assert any(told["interventions"] for told in reports(ours))
