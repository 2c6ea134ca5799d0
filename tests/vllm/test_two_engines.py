"""Two steered engines in one process: each steers, and admits, by its own configuration."""

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_value_steer import ValueFilterConfig, ValueHead, value_steer_generate
from tests.vllm import tiny
from tests.vllm.helpers import reports, run, tokens


def test_each_request_is_steered_by_the_head_of_its_own_engine(
    engine: Any, accepting: dict[str, Any], spread: str, desirable: str, folder: Any
) -> None:
    import torch
    from vllm import SamplingParams

    options = {"method": "filter", "proposal": "topk", "num_candidates": 4}
    configs = [{**options, "value_head": name, "threshold": 0.5} for name in (spread, desirable)]
    engines = [engine(config) for config in (accepting, *configs)]
    params, prompts = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), tiny.prompts(4)
    outputs = [run(llm, prompts, [params] * 4) for llm in engines]  # all of them are there by now
    again = [run(llm, prompts, [params] * 4) for llm in reversed(engines)][::-1]
    assert [tokens(each) for each in outputs] == [tokens(each) for each in again]
    assert len({str(tokens(each)) for each in outputs}) == 3
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for config, served in zip(configs, outputs[1:], strict=True):
        steer = ValueFilterConfig(
            value_head=ValueHead.from_pretrained(config["value_head"]),
            threshold=0.5,
            proposal="topk",
            num_candidates=4,
        )
        for prompt, text, told in zip(prompts, tokens(served), reports(served), strict=True):
            out = model.generate(
                torch.tensor([prompt]), custom_generate=value_steer_generate, value_steer=steer, do_sample=False,
                max_new_tokens=16, eos_token_id=None, return_dict_in_generate=True,
            )  # fmt: skip
            assert text == out.sequences[0, len(prompt) :].tolist()
            assert told["values"] == pytest.approx(out.token_values[0].tolist(), abs=1e-4)


def test_each_engine_admits_what_it_can_honour(engine: Any, accepting: dict[str, Any], desirable: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    filtering = engine(accepting)
    abstaining = engine({"method": "abstain", "value_head": desirable, "threshold": 0.001})
    for llm, right, wrong in (
        (filtering, {"filter.threshold": 0.8}, {"abstain.threshold": 0.5}),
        (abstaining, {"abstain.threshold": 0.0015}, {"filter.threshold": 0.5}),
        (filtering, {"filter.num_candidates": 3}, {"filter.alpha": 0.1}),
    ):
        run(llm, tiny.prompts(1), [SamplingParams(temperature=0, max_tokens=2, extra_args=right)])
        with pytest.raises(VLLMValidationError):
            run(llm, tiny.prompts(1), [SamplingParams(temperature=0, max_tokens=2, extra_args=wrong)])
