"""vLLM and `generate` take the same decisions."""

from typing import Any

import pytest
import torch

from hf_value_steer import ValueHead, enable_value_steer
from hf_value_steer.generation.candidates import sampled_alternatives, uniforms
from tests.vllm import tiny
from tests.vllm.helpers import reports, run, tokens
from tests.vllm.runners import SCALE


NEW_TOKENS = 32
NEAR = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny.build()
    enable_value_steer(model)
    return model


def _generate(model: Any, prompts: list[list[int]], value_steer: Any, **bans: Any) -> list[Any]:
    """What `generate` answers to each prompt alone."""
    return [
        model.generate(
            torch.tensor([prompt]),
            value_steer=value_steer,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **bans,
        )
        for prompt in prompts
    ]


def _near_tie(theirs: Any, step: int, thresholds: list[float]) -> bool:
    """Whether rounding may have decided the step: a value next to a threshold, or two logits next to each other."""
    values = theirs.token_values[0, : step + 1]
    close = [bool(((values - threshold).abs() < NEAR).any()) for threshold in thresholds]
    top = theirs.logits[step][0].topk(9).values
    return any(close) or bool((top.diff().abs() < NEAR).any())


FILTER = {"method": "filter", "threshold": 0.3, "proposal": "topk"}
ABSTAIN = {"method": "abstain", "threshold": 0.7}
CASES: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "filter": (56, [FILTER]),
    "sampled proposals of a greedy text": (12, [{**FILTER, "proposal": "sample", "num_candidates": 4}]),
    "eager": (12, [{**FILTER, "evaluation": "eager"}]),
    "args": (12, [{**FILTER, "threshold": 0.05, "fallback": "args", "prob_weight": 0.5}]),
    "fallback abstain": (24, [{**FILTER, "threshold": 0.02, "fallback": "abstain"}]),
    "limits": (12, [{**FILTER, "min_new_tokens": 5, "max_interventions": 4}]),
    "abstain": (24, [ABSTAIN]),
    "abstain with patience and message": (
        24,
        [{**ABSTAIN, "threshold": 0.4, "patience": 3, "min_new_tokens": 4, "message_ids": [5, 6, 7]}],
    ),
    "both": (24, [{**FILTER, "threshold": 0.5}, {**ABSTAIN, "threshold": 0.2, "patience": 3, "message_ids": [9]}]),
}


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_generate(engine: Any, model: Any, spread: str, case: str, record_property: Any) -> None:
    count, methods = CASES[case][0] // SCALE, CASES[case][1]
    interventions, abstained = _compare(engine, model, spread, count, methods, record_property)
    assert interventions or not any(each["method"] == "filter" for each in methods)
    assert abstained or case not in ("abstain", "abstain with patience and message", "both", "fallback abstain")


MESSAGE = {"message_ids": [5, 6, 7]}
ENDING = {
    "filter": [{**FILTER, "threshold": 0.02, "fallback": "abstain"}],
    "eager filter": [{**FILTER, "threshold": 0.02, "fallback": "abstain", "evaluation": "eager"}],
    "abstain": [ABSTAIN],
    "abstain with message": [{**ABSTAIN, **MESSAGE}],
    "abstain with patience": [{**ABSTAIN, "threshold": 0.4, "patience": 3}],
    "abstain with patience and message": [{**ABSTAIN, "threshold": 0.4, "patience": 3, **MESSAGE}],
    "both": [{**FILTER, "threshold": 0.5, "fallback": "abstain"}, {**ABSTAIN, "patience": 3, **MESSAGE}],
}
EVERYTHING_BUT = {banned: [token for token in range(tiny.VOCABULARY) if token != banned] for banned in (tiny.EOS, 6)}
BANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a minimum": ({"min_tokens": 8}, {"min_new_tokens": 8}),
    "no EOS": ({"allowed_token_ids": EVERYTHING_BUT[tiny.EOS]}, {"suppress_tokens": [tiny.EOS]}),
    "no EOS by a bias": ({"logit_bias": {tiny.EOS: -float("inf")}}, {"suppress_tokens": [tiny.EOS]}),
    "no token of the message": ({"allowed_token_ids": EVERYTHING_BUT[6]}, {"suppress_tokens": [6]}),
    "a bad word of the message": ({"bad_words": ["w7"]}, {"bad_words_ids": [[7]]}),
    "a bad word across the message": ({"bad_words": ["w6 w7"]}, {"bad_words_ids": [[6, 7]]}),
}
FORBIDDING = [
    *((ban, ending) for ban in ("a minimum", "no EOS") for ending in ENDING),
    *((ban, "abstain with patience and message") for ban in list(BANS)[2:]),
    ("a bad word across the message", "both"),
]
FOR_EVER = {"no EOS", "no EOS by a bias", "no token of the message", "a bad word of the message"}


@pytest.mark.parametrize(("ban", "ending"), FORBIDDING)
def test_what_the_request_forbids_binds_what_is_inserted(
    engine: Any, model: Any, spread: str, ban: str, ending: str, record_property: Any
) -> None:
    """As in `generate`: an ending waits until none of its tokens is forbidden, and so does each token of it."""
    methods, bans = ENDING[ending], BANS[ban]
    _, abstained = _compare(engine, model, spread, 16 // SCALE, methods, record_property, *bans)
    if ban in FOR_EVER and ending != "both":
        assert not abstained
    elif ban not in FOR_EVER:
        assert abstained


def _compare(
    engine: Any,
    model: Any,
    spread: str,
    count: int,
    methods: list[dict[str, Any]],
    record_property: Any,
    ours: dict[str, Any] | None = None,
    theirs: dict[str, Any] | None = None,
) -> tuple[int, int]:
    """Ask both, `ours` and `theirs` being what only one of them takes; returns interventions and ended texts."""
    from vllm import SamplingParams

    value_steer = [{**each, "value_head": spread} for each in methods]
    prompts = tiny.prompts(count)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, **ours or {})
    outputs = run(engine(value_steer), prompts, [params] * count)
    expectations = _generate(model, prompts, value_steer, **theirs or {})
    near, interventions, abstained = 0, 0, 0
    for prompt, mine, told, answer in zip(prompts, tokens(outputs), reports(outputs), expectations, strict=True):
        expected = answer.sequences[0, len(prompt) :].tolist()
        if mine != expected:
            step = next(i for i, pair in enumerate(zip(mine, expected, strict=False)) if pair[0] != pair[1])
            assert _near_tie(answer, step, [each["threshold"] for each in methods]), (prompt, step)
            near += 1
            continue
        known = len(told["values"])
        assert known >= len(mine) - 1
        assert told["values"] == pytest.approx(answer.token_values[0, :known].tolist(), abs=1e-4)
        assert told["prompt_value"] == pytest.approx(float(answer.prompt_values[0]), abs=1e-4)
        assert told["interventions"] == answer.interventions[0].nonzero().flatten().tolist()
        assert bool(told["abstained"]) == bool(answer.abstained[0])
        if told["abstained"]:
            assert told["abstained"]["step"] == int(answer.abstention_step[0])
            assert told["abstained"]["value"] == pytest.approx(float(answer.abstention_value[0]), abs=1e-4)
        interventions += len(told["interventions"])
        abstained += bool(told["abstained"])
    record_property("near_ties", near)
    assert near <= 2
    return interventions, abstained


def test_alternatives_take_turns_on_few_blocks(engine: Any, spread: str) -> None:
    from vllm import SamplingParams

    value_steer, prompts = {**FILTER, "value_head": spread}, tiny.prompts(12 // SCALE)
    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS)] * len(prompts)
    roomy, tight = engine([value_steer]), engine(value_steer, num_gpu_blocks_override=40)  # 50 blocks against 5
    assert tokens(run(tight, prompts, params)) == tokens(run(roomy, prompts, params))


@torch.no_grad()
@pytest.mark.parametrize("case", ["filter", "abstain with patience and message", "both"])
def test_logprobs_are_those_of_the_emitted_tokens(engine: Any, model: Any, spread: str, case: str) -> None:
    from vllm import SamplingParams

    value_steer, prompts = [{**each, "value_head": spread} for each in CASES[case][1]], tiny.prompts(12 // SCALE)
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 2}
    outputs = run(engine(value_steer), prompts, [SamplingParams(**options)] * len(prompts))
    replaced = 0
    for prompt, ids, output in zip(prompts, tokens(outputs), outputs, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected, told = logits.log_softmax(-1), output.outputs[0].logprobs
        assert [told[step][token].logprob for step, token in enumerate(ids)] == pytest.approx(
            [float(expected[step, token]) for step, token in enumerate(ids)], abs=1e-3
        )
        for step, token in enumerate(ids):
            assert told[step][token].rank == 1 + int((expected[step] > expected[step, token]).sum())
            replaced += told[step][token].rank > 1
    assert replaced > 10 // SCALE


def test_a_single_candidate_is_only_reported(engine: Any, spread: str) -> None:
    from vllm import SamplingParams

    llm, prompts = engine([{**FILTER, "value_head": spread}]), tiny.prompts(6)
    single, off = (
        run(llm, prompts, [SamplingParams(temperature=0, max_tokens=NEW_TOKENS // SCALE, extra_args=extra)] * 6)
        for extra in ({"filter.num_candidates": 1}, {"filter": "off"})
    )
    assert tokens(single) == tokens(off)
    assert not any(told["interventions"] for told in reports(single))
    assert max(max(told["values"]) for told in reports(single)) > FILTER["threshold"]


THRESHOLDS, COUNTS = (0.3, 0.5, 0.7), (4, 8)


@torch.no_grad()
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_every_decision_recomputed(
    engine: Any, model: Any, spread: str, desirable: str, polarity: str, record_property: Any
) -> None:
    """Sampled requests with a threshold and a K of their own: each step against transformers in float32."""
    from vllm import SamplingParams

    from hf_value_steer.vllm.request import _key

    folder = spread if polarity == "undesirable" else desirable
    head, sign = ValueHead.from_pretrained(folder), 1 if polarity == "undesirable" else -1
    prompts = tiny.prompts(24 // SCALE)
    chosen = [(THRESHOLDS[index % 3], COUNTS[index % 2]) for index in range(len(prompts))]
    params = [
        SamplingParams(
            temperature=0.8,
            seed=index,
            max_tokens=40,
            extra_args={"filter.threshold": threshold, "filter.num_candidates": count},
        )
        for index, (threshold, count) in enumerate(chosen)
    ]
    ours = run(engine({"method": "filter", "value_head": folder}), prompts, params)
    steps = interventions = fallbacks = near = 0
    for index, (prompt, ids, told) in enumerate(zip(prompts, tokens(ours), reports(ours), strict=True)):
        (threshold, count), text = chosen[index], [*prompt, *ids]
        out = model(torch.tensor([text]), output_hidden_states=True)
        values = head(out.hidden_states[-1][0]).value
        assert told["values"] == pytest.approx(values[len(prompt) :].tolist(), abs=1e-4)
        for step, token in enumerate(ids):
            steps += 1
            place = len(prompt) + step
            value, intervened = sign * float(values[place]), step in told["interventions"]
            if value < sign * threshold and not intervened:
                continue
            scores = out.logits[0, place - 1] / 0.8
            numbers = uniforms(_key(None, index, ""), [0], step, count - 1)
            drawn = sampled_alternatives(scores[None], numbers)[0]
            batch = torch.tensor([[*text[:place], int(each)] for each in drawn])
            found = sign * head(model(batch, output_hidden_states=True).hidden_states[-1][:, -1]).value
            passed = (found < sign * threshold).nonzero().flatten()
            if len(passed):
                right = intervened and token == int(drawn[passed[0]])
            else:
                right = value <= float(found.min()) + NEAR and value >= sign * threshold
                fallbacks += 1
            interventions += intervened
            boundaries = scores.double().softmax(-1).cumsum(-1)
            edge = float((boundaries[:, None] - numbers).abs().min())
            if not right:
                assert edge < 1e-6 or float((found - sign * threshold).abs().min()) < NEAR, (index, step)
                near += 1
    record_property("steps", steps)
    record_property("interventions", interventions)
    record_property("fallbacks", fallbacks)
    assert near <= 1 and steps > 500 // SCALE and interventions > 100 // SCALE and fallbacks > 20 // SCALE
