"""The ends of texts that steering inserts: what binds them is what the request forbids; see `test_parity`, too."""

from typing import Any

import pytest

from tests.vllm import tiny
from tests.vllm.helpers import reports, run, scheduler, tokens
from tests.vllm.runners import SCALE
from tests.vllm.test_identity import counted


FILTER = {"method": "filter", "threshold": 0.02, "fallback": "abstain"}
ABSTAIN = {"method": "abstain", "threshold": 0.2, "message_ids": [5, 6, 7]}


@pytest.mark.parametrize("method", [FILTER, ABSTAIN], ids=["filter", "abstain"])
def test_what_only_narrows_the_sampling_forbids_nothing(engine: Any, spread: str, method: dict[str, Any]) -> None:
    """An EOS that would not be drawn ends a text all the same; one that a processor of the user forbids does not."""
    from vllm import SamplingParams

    value_steer, count = {**method, "value_head": spread}, 12 // SCALE
    narrow = {"temperature": 0.8, "max_tokens": 32, "min_tokens": 4, "top_k": 2, "min_p": 0.2}
    params = [SamplingParams(seed=seed, **narrow) for seed in range(count)]
    free, bound = (
        run(llm, tiny.prompts(count), params)
        for llm in (engine(value_steer), engine(value_steer, logits_processors=["tests.vllm.processors:NoEnd"]))
    )
    steps = [told["abstained"]["step"] for told in reports(free) if told["abstained"]]
    assert len(steps) > count // 2 and min(steps) == narrow["min_tokens"]
    assert not any(told["abstained"] for told in reports(bound))
    assert not any(tiny.EOS in ids for ids in tokens(bound))


@pytest.mark.parametrize("filtered", [False, True])
def test_preemption_within_an_ending(
    engine: Any, spread: str, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message goes on where it was, although the request forbade a token in the middle of it."""
    from vllm import SamplingParams

    message = list(range(10, 40))
    methods = [{**ABSTAIN, "message_ids": message}, *([{**FILTER, "threshold": 0.5}] if filtered else [])]
    value_steer, prompts = [{**each, "value_head": spread} for each in methods], tiny.prompts(12, 20, 60)
    params = [
        SamplingParams(temperature=0.9, seed=index, max_tokens=50, min_tokens=3, bad_words=["w19 w20"])
        for index in range(12)
    ]
    expected = run(engine(value_steer), prompts, params)
    llm = engine(value_steer, num_gpu_blocks_override=16)
    preempted: list[Any] = []
    monkeypatch.setattr(scheduler(llm), "_preempt_request", counted(scheduler(llm)._preempt_request, preempted))
    ours = run(llm, prompts, params)
    assert preempted
    assert tokens(ours) == tokens(expected)
    steps, right = ([(told["abstained"] or {}).get("step") for told in reports(each)] for each in (ours, expected))
    assert steps == right
    ended = [ids for ids in tokens(ours) if ids[-2:] == [message[-1], tiny.EOS]]
    assert len(ended) > 3
    for ids in ended:
        assert ids[-32:-22] == message[:10] and ids[-21:-1] == message[10:]  # with a token of the model's in between
