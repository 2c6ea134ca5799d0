"""Nothing is emitted unchecked: whatever goes wrong with a value ends the requests in question, not the engine."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.vllm import tiny
from tests.vllm.helpers import reports, run, runner, tokens


COUNT = 8


@pytest.fixture
def llm(engine: Any, spread: str) -> Iterator[Any]:
    yield engine({"method": "filter", "value_head": spread, "threshold": 0.3, "proposal": "topk"})


def _params() -> list[Any]:
    """Every other request is not steered."""
    from vllm import SamplingParams

    off = [{"filter": "off"} if index % 2 else None for index in range(COUNT)]
    return [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=each) for each in off]


def break_head(llm: Any, monkeypatch: pytest.MonkeyPatch, kind: str, after: int) -> None:
    """From the call after `after` others on, the head raises, or answers `kind`, a number, to its first row."""
    head = next(iter(runner(llm).served.heads.values()))
    forward, calls = head.forward, []

    def broken(features: torch.Tensor) -> Any:
        calls.append(features)
        answer = forward(features)
        if len(calls) > after and kind == "raises":
            raise RuntimeError("out of memory")
        if len(calls) > after:
            answer.value[:1] = float(kind)
        return answer

    monkeypatch.setattr(head, "forward", broken)


@pytest.mark.parametrize("kind", ["nan", "raises"])
@pytest.mark.parametrize("after", [0, 1, 2, 7, 8])
def test_a_broken_head(llm: Any, monkeypatch: pytest.MonkeyPatch, kind: str, after: int) -> None:
    prompts, params = tiny.prompts(COUNT), _params()
    right = run(llm, prompts, params)
    with monkeypatch.context() as patch:
        break_head(llm, patch, kind, after)
        broken = run(llm, prompts, params)
    for index, (good, bad) in enumerate(zip(right, broken, strict=True)):
        if index % 2:
            assert bad.outputs[0].finish_reason == "length"
            assert tokens([bad]) == tokens([good])
        else:
            assert bad.outputs[0].finish_reason == "error"
            emitted = tokens([bad])[0]
            assert emitted == tokens([good])[0][: len(emitted)]
            assert "finite" in bad.kv_transfer_params["value_steer"]["error"]
    assert tokens(run(llm, prompts, params)) == tokens(right)


@pytest.mark.parametrize("answer", ["-inf", "inf", "1.5", "-0.5"])
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("method", ["filter", "eager filter", "abstain"])
def test_an_answer_that_is_no_probability(
    engine: Any, spread: str, desirable: str, monkeypatch: pytest.MonkeyPatch, answer: str, polarity: str, method: str
) -> None:
    """One of them looks acceptable, whatever the polarity; the token in question is not emitted."""
    from vllm import SamplingParams

    head = {"value_head": spread if polarity == "undesirable" else desirable, "threshold": 0.5}
    value_steer = {
        "filter": {"method": "filter", **head},
        "eager filter": {"method": "filter", "evaluation": "eager", **head},
        "abstain": {"method": "abstain", "patience": 20, **head},
    }[method]
    llm, params = engine(value_steer), [SamplingParams(temperature=0, max_tokens=16, ignore_eos=method != "abstain")]
    (right,) = run(llm, tiny.prompts(1), params)
    with monkeypatch.context() as patch:
        break_head(llm, patch, answer, 5)
        (broken,) = run(llm, tiny.prompts(1), params)
    assert broken.outputs[0].finish_reason == "error"
    assert "finite" in broken.kv_transfer_params["value_steer"]["error"]
    (emitted,), (good,) = tokens([broken]), tokens([right])
    assert emitted == good[: len(emitted)] and len(emitted) < 6
    assert not any(value < 0 or value > 1 for value in broken.kv_transfer_params["value_steer"]["values"])


@pytest.mark.parametrize("where", ["in_place", "aside", "commit"])
def test_out_of_memory_in_the_lookahead(llm: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    prompts, params = tiny.prompts(COUNT), _params()
    right = run(llm, prompts, params)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner(llm).lookahead, where, fail)
        broken = run(llm, prompts, params)
    ended = [each.outputs[0].finish_reason for each in broken]
    assert ended[1::2] == ["length"] * 4
    assert "error" in ended[::2]
    for good, bad in zip(right, broken, strict=True):
        emitted = tokens([bad])[0]
        assert emitted == tokens([good])[0][: len(emitted)]
    assert tokens(run(llm, prompts, params)) == tokens(right)


def test_a_stop_string_has_its_report(llm: Any) -> None:
    from vllm import SamplingParams

    prompts = tiny.prompts(4)
    texts = run(llm, prompts, [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)] * 4)
    stops = [each.outputs[0].text.split()[8] for each in texts]
    params = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop=[stop]) for stop in stops]
    outputs = run(llm, prompts, params)
    assert [each.outputs[0].finish_reason for each in outputs] == ["stop"] * 4
    assert [told["tokens"] for told in reports(outputs)] == [len(ids) for ids in tokens(outputs)]
