"""What cannot be steered is refused by name, and what a request may choose is checked before it is admitted."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_value_steer import ValueHead
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.calibration import Calibration
from hf_value_steer.errors import UnsupportedError
from tests.vllm import tiny
from tests.vllm.helpers import reports, run, tokens


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "a KV connector"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
)
def test_engines_that_are_refused(folder: Path, arguments: dict[str, Any], name: str) -> None:
    from vllm import EngineArgs

    from hf_value_steer.vllm.refusals import refuse_engine

    config = EngineArgs(model=str(folder), max_model_len=128, **arguments).create_engine_config()
    with pytest.raises(ValueError, match=name):
        refuse_engine(config)


def test_another_version_and_async_scheduling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm import EngineArgs

    from hf_value_steer.vllm.refusals import refuse_engine

    config = EngineArgs(model=str(folder), max_model_len=128).create_engine_config()
    refuse_engine(config)
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.31.2")
        with pytest.raises(ValueError, match="validated with vLLM 0.32, 0.33, but this is 0.31.2"):
            refuse_engine(config)
        patch.setenv("HF_VALUE_STEER_ANY_VLLM", "1")
        refuse_engine(config)
    config.scheduler_config.async_scheduling = True
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    refuse_engine(config)
    monkeypatch.setattr(type(config), "use_v2_model_runner", False)
    with pytest.raises(ValueError, match="async scheduling with the V1 model runner"):
        refuse_engine(config)


def test_heads_that_do_not_fit(folder: Path, spread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import EngineArgs

    from hf_value_steer.vllm.refusals import refuse_head
    from hf_value_steer.vllm.served import ServedMethods

    model = EngineArgs(model=str(folder), max_model_len=128).create_engine_config().model_config
    head = ValueHead.from_pretrained(spread)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="hidden_size=96, but"):
        patch.setattr(type(model), "get_hidden_size", lambda _: 128)
        refuse_head(ServedMethods.load({"method": "filter", "value_head": spread}), model)
    for expected in (fingerprint(tiny.build()), "0123456789abcdef"):
        head.config.backbone_fingerprint = expected
        head.save_pretrained(tmp_path / expected)
        served = ServedMethods.load({"method": "filter", "value_head": str(tmp_path / expected)})
        if expected == "0123456789abcdef":
            with pytest.raises(ValueError, match="fingerprint 0123456789abcdef, but"):
                refuse_head(served, model)
        else:
            refuse_head(served, model)


@pytest.mark.parametrize("method", ["filter", "abstain"])
@pytest.mark.parametrize(
    "reads",
    [{"feature_layers": [1]}, {"feature_layers": [0.5, "final"]}, {"temporal": "mean"}, {"temporal": "ema"}],
    ids=str,
)
def test_heads_that_read_more_than_the_final_state(
    spread: str, tmp_path: Path, method: str, reads: dict[str, Any]
) -> None:
    """Where the arguments are made and in the worker, also if the width is that of the final state."""
    from hf_value_steer.vllm import steered_engine_args
    from hf_value_steer.vllm.served import ServedMethods

    head = ValueHead.from_pretrained(spread)
    head.config.update(reads)
    head.save_pretrained(tmp_path)
    value_steer = {"method": method, "value_head": str(tmp_path), "threshold": 0.5}
    name, value = next(iter(reads.items()))
    for start in (ServedMethods.load, partial(steered_engine_args, "model")):
        with pytest.raises(UnsupportedError, match=re.escape(f"`{name}`={value!r}") + ".*steer with `generate`"):
            start(value_steer)


@pytest.mark.parametrize("message", [[tiny.VOCABULARY], [5, 100_000, 6, 191]])
def test_a_message_beyond_the_vocabulary(folder: Path, spread: str, message: list[int]) -> None:
    """Refused when the engine starts, also where the vocabulary of the weights is padded to more."""
    from vllm import LLM

    from hf_value_steer.vllm import steered_engine_args

    abstain = {"method": "abstain", "value_head": spread, "message_ids": message}
    beyond = [token for token in message if token >= tiny.VOCABULARY]
    with pytest.raises(ValueError, match=re.escape(f"{beyond} of `message_ids`")):
        LLM(**steered_engine_args(str(folder), abstain, max_model_len=128, enforce_eager=True))


@pytest.mark.parametrize(("eos", "message"), [(tiny.VOCABULARY, f"only {tiny.VOCABULARY} tokens"), (None, "has none")])
@pytest.mark.parametrize(
    "value_steer",
    [{"method": "abstain"}, {"method": "filter", "fallback": "abstain"}],
    ids=lambda each: each["method"],
)
def test_an_eos_that_the_model_does_not_have(
    engine: Any, spread: str, value_steer: Any, eos: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends requests that need it, and no others; the engine lives on."""
    from vllm import SamplingParams

    llm, prompts = engine({**value_steer, "value_head": spread}), tiny.prompts(2)
    params = [SamplingParams(max_tokens=3, extra_args=each) for each in (None, {value_steer["method"]: "off"})]
    with monkeypatch.context() as patch:
        patch.setattr(SamplingParams, "eos_token_id", property(lambda _: eos))
        outputs = run(llm, prompts, params)
    assert [each.outputs[0].finish_reason for each in outputs] == ["error", "length"]
    assert message in reports(outputs)[0]["error"]
    assert tokens(run(llm, prompts, params))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_candidates": True}, "output_candidates"),
        ({"lookahead": "masked"}, "lookahead"),
        ({"rollback": 4}, "`rollback` is for `generate`"),
        ({"threshold": [0.2, 0.3]}, "one number"),
        ({"num_candidates": 65}, "at most 64"),
        ({"value_head": None}, "value_head"),
        ({"alpha": 0.1}, "no calibration.json"),
        ({"methud": 1}, "methud"),
    ],
)
def test_configurations_that_are_refused(spread: str, change: dict[str, Any], message: str) -> None:
    from hf_value_steer.vllm import steered_engine_args

    with pytest.raises(ValueError, match=message):
        steered_engine_args("model", {"method": "filter", "value_head": spread, **change})
    with pytest.raises(ValueError, match="`worker_cls`"):
        steered_engine_args("model", {"method": "filter", "value_head": spread}, worker_cls="another")


def test_methods_that_are_not_served(spread: str) -> None:
    from hf_value_steer.vllm.served import ServedMethods

    gated = {"method": "activate", "vectors": "somewhere", "value_head": spread, "threshold": 0.5}
    with pytest.raises(ValueError, match='"activate" is for `generate`; vLLM serves "filter" and "abstain"'):
        ServedMethods.load([{"method": "filter", "value_head": spread, "threshold": 0.5}, gated])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"filter.threshold": 1.5}, "threshold"),
        ({"filter.threshold": "0.3"}, "filter.threshold"),
        ({"filter.threshold": [0.3]}, "filter.threshold"),
        ({"filter.alpha": 0.1}, "calibration"),
        ({"filter.num_candidates": 0}, "filter.num_candidates"),
        ({"filter.num_candidates": 65}, "filter.num_candidates"),
        ({"filter.num_candidates": True}, "filter.num_candidates"),
        ({"filter.fallback": "abstain"}, "filter.fallback"),
        ({"filter": "on"}, "filter"),
        ({"filter.": 1}, "filter."),
        ({"filter.threshold": 0.3, "filter.alpha": 0.1}, "pass one of them"),
        ({"abstain": "off"}, 'does not run "abstain"'),
        ({"filter_threshold": 0.3}, "did you mean `filter.threshold`"),
        ({"fliter": "off"}, "did you mean `filter`"),
        ({"steer.alpha": 0.1}, "did you mean `filter.alpha`"),
        ({"num_candidates": 4}, "did you mean `filter.num_candidates`"),
    ],
)
def test_requests_that_are_not_admitted(engine: Any, accepting: dict[str, Any], extra: Any, message: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm, prompts = engine(accepting), tiny.prompts(1)
    with pytest.raises(VLLMValidationError, match=message):
        run(llm, prompts, [SamplingParams(extra_args=extra)])
    of_others = SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"min_threshold": 0.3, "filters_of_mine": 1})
    assert len(tokens(run(llm, prompts, [of_others]))[0]) == 3


def test_features_that_are_not_admitted(engine: Any, spread: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    llm, prompts = engine([{"method": "abstain", "value_head": spread}]), tiny.prompts(1)
    for options, message in (
        ({"structured_outputs": StructuredOutputsParams(regex="w+")}, "structured outputs"),
        ({"logprob_token_ids": [3]}, "logprob_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            run(llm, prompts, [SamplingParams(max_tokens=3, **options)])
        params = SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"abstain": "off"})
        assert len(tokens(run(llm, prompts, [params]))[0]) == 3


def test_overrides_that_passed_by_admission_end_their_request(
    engine: Any, accepting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an API server of another process, which does not know what the engine steers."""
    from vllm import SamplingParams

    from hf_value_steer.vllm.admission import admission

    llm, prompts = engine(accepting), tiny.prompts(2)
    name = llm.llm_engine.model_config.logits_processors[0]
    monkeypatch.setattr(admission(name), "served", None)
    wrong, right = SamplingParams(extra_args={"filter.alpha": 0.1}), SamplingParams(max_tokens=3, ignore_eos=True)
    outputs = run(llm, prompts, [wrong, right])
    assert [each.outputs[0].finish_reason for each in outputs] == ["error", "length"]
    assert tokens(outputs)[0] == [] and "calibration" in reports(outputs)[0]["error"]


def test_alpha(engine: Any, spread: str, tmp_path: Path) -> None:
    """A promise, also one whose thresholds follow the value of the prompt, and another one for a request."""
    from vllm import SamplingParams

    head = ValueHead.from_pretrained(spread)
    for mode in ("marginal", "martingale"):
        folder = tmp_path / mode
        head.calibration = _calibration(mode)
        head.save_pretrained(folder)
        llm = engine({"method": "filter", "value_head": str(folder), "alpha": 0.3, "proposal": "topk"})
        params = [
            SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=each)
            for each in (None, {"filter.alpha": 0.3}, {"filter.alpha": 0.7}, {"filter.threshold": 0.9})
        ]
        outputs = run(llm, tiny.prompts(1) * 4, params)
        counts = [len(told["interventions"]) for told in reports(outputs)]
        assert tokens(outputs)[0] == tokens(outputs)[1]
        assert counts[2] >= counts[0] >= counts[3]
        assert counts[2] > counts[3]


def _calibration(mode: Any) -> Calibration:
    """Scores as if texts' worst values were spread over (0, 1), from prompts of value one half."""
    scores = np.linspace(0.02, 0.98, 49)
    prompt_values = np.full(49, 0.5) if mode == "martingale" else None
    return Calibration.from_scores(scores, mode=mode, prompt_values=prompt_values)
