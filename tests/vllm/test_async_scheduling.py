"""Async scheduling, which the V2 model runner allows: what is ordered before it is known changes nothing."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm import tiny
from tests.vllm.helpers import alike, reports, run, scheduler, tokens
from tests.vllm.runners import SCALE, V2
from tests.vllm.test_failing import break_head
from tests.vllm.test_identity import counted


pytestmark = pytest.mark.skipif(not V2, reason="the V1 model runner is not steered under async scheduling")
FILTER = {"method": "filter", "threshold": 0.3}
ABSTAIN = {"method": "abstain", "threshold": 0.2, "patience": 3, "message_ids": [9]}
ENDING_FILTER = {**FILTER, "threshold": 0.1, "fallback": "abstain"}


@pytest.fixture(autouse=True)
def asynchronous() -> Iterator[None]:
    """On a CPU, too, where vLLM switches it off."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def leave_it_on(config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        update(config)
        config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(leave_it_on))
        yield


def _params(count: int) -> list[Any]:
    from vllm import SamplingParams

    return [
        SamplingParams(
            temperature=index % 2, seed=index, max_tokens=(60 - 3 * index) // SCALE, min_tokens=3 * (index % 3)
        )
        for index in range(count)
    ]


@pytest.mark.parametrize(
    "methods",
    [[FILTER], [ABSTAIN], [FILTER, ABSTAIN], [ENDING_FILTER]],
    ids=["filter", "abstain", "both", "fallback abstain"],
)
def test_the_same_with_and_without(engine: Any, spread: str, methods: list[dict[str, Any]]) -> None:
    value_steer, prompts = [{**each, "value_head": spread} for each in methods], tiny.prompts(12)
    llm = engine(value_steer, async_scheduling=True)
    assert type(scheduler(llm)).__name__ == "AsyncSteeredScheduler"
    assert llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
    ours, expected = (run(each, prompts, _params(12)) for each in (llm, engine(value_steer)))
    assert tokens(ours) == tokens(expected)
    assert reports(ours) == [alike(each) for each in reports(expected)]
    assert any(told["interventions"] or told["abstained"] for told in reports(ours))


def test_the_same_as_stock(engine: Any, accepting: dict[str, Any]) -> None:
    prompts = tiny.prompts(12)
    stock, ours = (run(engine(each, async_scheduling=True), prompts, _params(12)) for each in (None, accepting))
    assert tokens(ours) == tokens(stock)


def test_preemption(engine: Any, spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is on its way while its request is preempted is delivered, and reported, once."""
    value_steer, prompts = {**FILTER, "value_head": spread}, tiny.prompts(12, 20, 60)
    expected = run(engine(value_steer), prompts, _params(12))
    llm = engine(value_steer, async_scheduling=True, num_gpu_blocks_override=16)
    preempted: list[Any] = []
    monkeypatch.setattr(scheduler(llm), "_preempt_request", counted(scheduler(llm)._preempt_request, preempted))
    ours = run(llm, prompts, _params(12))
    assert preempted
    assert tokens(ours) == tokens(expected)
    assert [told["interventions"] for told in reports(ours)] == [told["interventions"] for told in reports(expected)]
    for told, ids in zip(reports(ours), tokens(ours), strict=True):
        assert len(told["values"]) == told["tokens"] == len(ids)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_broken_head(engine: Any, spread: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The step that was ordered before the failure was known emits nothing."""
    llm, prompts = engine([{**FILTER, "value_head": spread}], async_scheduling=True), tiny.prompts(8)
    right = run(llm, prompts, _params(8))
    with monkeypatch.context() as patch:
        break_head(llm, patch, "raises", after)
        broken = run(llm, prompts, _params(8))
    for good, bad in zip(tokens(right), broken, strict=True):
        (emitted,) = tokens([bad])
        assert emitted == good[: len(emitted)]
        assert bad.outputs[0].finish_reason == "error" or emitted == good
    assert {each.outputs[0].finish_reason for each in broken} >= {"error"}
    assert tokens(run(llm, prompts, _params(8))) == tokens(right)
