"""With a head that accepts everything, vLLM writes what it writes without us, token for token."""

from typing import Any

import pytest

from tests.vllm import tiny
from tests.vllm.helpers import reports, run, scheduler, tokens
from tests.vllm.runners import SCALE


LENGTHS = [max(1, length // SCALE) for length in (40, 75, 33, 64, 60, 5, 1, 50, 48, 31, 32, 70)]


def _params(kind: str) -> list[Any]:
    from vllm import SamplingParams

    options: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "nucleus": {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
        "penalties": {"min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 20},
        "mixed": {"bad_words": ["w7 w8"]},
    }
    params = []
    for index, length in enumerate(LENGTHS):
        chosen = {"seed": index, "max_tokens": length, "logprobs": index % 3 or None, **options[kind]}
        if kind == "mixed":
            chosen |= {"temperature": index % 2, "prompt_logprobs": 1}
        if kind == "greedy":
            del chosen["seed"]
        chosen["min_tokens"] = min(length, chosen.get("min_tokens", 0))
        params.append(SamplingParams(**chosen))
    return params


def _logprobs(outputs: list[Any]) -> list[Any]:
    """Of prompts, where they are asked for, and of new tokens."""
    return [
        [
            {token: entry.logprob for token, entry in (step or {}).items()}
            for step in [*(each.prompt_logprobs or ()), *(each.outputs[0].logprobs or ())]
        ]
        for each in outputs
    ]


@pytest.mark.parametrize("kind", ["greedy", "nucleus", "penalties", "mixed"])
def test_same_tokens_and_logprobs_as_stock(engine: Any, accepting: dict[str, Any], kind: str) -> None:
    prompts, params = tiny.prompts(len(LENGTHS)), _params(kind)
    stock, ours = run(engine(), prompts, params), run(engine(accepting), prompts, params)
    assert tokens(ours) == tokens(stock)
    assert _logprobs(ours) == _logprobs(stock)
    assert [each.outputs[0].finish_reason for each in ours] == [each.outputs[0].finish_reason for each in stock]
    for told, ids in zip(reports(ours), tokens(ours), strict=True):
        assert len(told["values"]) == told["tokens"] == len(ids)
        assert not told["interventions"]


def test_prompts_in_chunks(engine: Any, accepting: dict[str, Any]) -> None:
    prompts, params = tiny.prompts(len(LENGTHS), 20, 60), _params("greedy")
    chunks = {"max_num_batched_tokens": 32, "enable_prefix_caching": False}
    assert tokens(run(engine(accepting, **chunks), prompts, params)) == tokens(run(engine(**chunks), prompts, params))


def counted(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_preemption(engine: Any, accepting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    prompts = tiny.prompts(len(LENGTHS), 20, 60)
    params = [
        SamplingParams(temperature=0.9, seed=index, max_tokens=60 // SCALE, ignore_eos=True) for index in range(12)
    ]
    counts, answers = [], []
    for value_steer, blocks in ((None, 14), (accepting, 16)):
        llm = engine(value_steer, num_gpu_blocks_override=blocks)
        preempted: list[Any] = []
        monkeypatch.setattr(scheduler(llm), "_preempt_request", counted(scheduler(llm)._preempt_request, preempted))
        answers.append(tokens(run(llm, prompts, params)))
        counts.append(len(preempted))
    assert min(counts) > 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("seeded", [False, True])
def test_context_full(engine: Any, accepting: dict[str, Any], seeded: bool) -> None:
    from vllm import SamplingParams

    prompts = tiny.prompts(8, 60, 90)
    params = [
        SamplingParams(temperature=float(seeded), seed=index if seeded else None, max_tokens=500, ignore_eos=True)
        for index in range(8)
    ]
    stock, ours = (tokens(run(engine(each, max_model_len=96), prompts, params)) for each in (None, accepting))
    assert ours == stock
    assert all(len(prompt) + len(ids) == 96 for prompt, ids in zip(prompts, ours, strict=True))


def test_prefix_cache_holds_what_interventions_wrote(engine: Any, spread: str) -> None:
    from vllm import SamplingParams

    llm, prompts = engine({"method": "filter", "value_head": spread, "threshold": 0.3}), tiny.prompts(8, 20, 30)
    params = [SamplingParams(seed=index, max_tokens=70 // SCALE, ignore_eos=True) for index in range(8)]
    written = run(llm, prompts, params)
    assert sum(len(told["interventions"]) for told in reports(written)) > 100 // SCALE
    texts = [[*prompt, *ids] for prompt, ids in zip(prompts, tokens(written), strict=True)]
    params = [SamplingParams(temperature=0, max_tokens=20 // SCALE, extra_args={"filter": "off"})] * 8
    cached = run(llm, texts, params)
    assert sum(each.num_cached_tokens for each in cached) >= 8 * 32
    fresh = engine(enable_prefix_caching=False)
    assert tokens(cached) == tokens(run(fresh, texts, params))
