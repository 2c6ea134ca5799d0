"""Generation with a head of several attributes: what it commits is what each attribute's own threshold says."""

import math
from types import SimpleNamespace

import pytest
import torch

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig
from hf_value_steer.backbone.parts import feature_width
from tests.families import prompts
from tests.oracle import Oracle
from tests.steer import steer


SAMPLING = {"do_sample": True, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 14}
ATTRIBUTES = [
    {"name": "rude", "polarity": "undesirable", "threshold": 0.45},
    {"name": "polite", "polarity": "desirable", "threshold": 0.35},
    {"name": "long", "polarity": "undesirable", "threshold": 0.7},
]


def make_head(model, combine):
    torch.manual_seed(7)
    head = ValueHead(ValueHeadConfig(hidden_size=feature_width(model), attributes=ATTRIBUTES, combine=combine))
    with torch.no_grad():
        head.net[-1].weight.mul_(8.0)
    return head


def by_hand(logits, combine):
    """The one logit for those of the attributes, in plain Python."""
    beyond = []
    for logit, attribute in zip(logits, ATTRIBUTES, strict=True):
        distance = logit - math.log(attribute["threshold"] / (1 - attribute["threshold"]))
        beyond.append(distance if attribute["polarity"] == "undesirable" else -distance)
    return max(beyond) if combine == "worst" else sum(beyond) / len(beyond)


def passes(values):
    """Whether the attributes' values `(A,)` pass their own thresholds."""
    ways = {"undesirable": float.__lt__, "desirable": float.__gt__}
    return all(ways[a["polarity"]](value, a["threshold"]) for value, a in zip(values, ATTRIBUTES, strict=True))


@torch.no_grad()
def last_values(model, head, text):
    """Values of the attributes at the last token of `text` `(tokens,)`, read without a cache."""
    return head.attribute_values(model.model(text[None]).last_hidden_state[0, -1]).tolist()


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("combine", ["worst", "sum"])
def test_commits_what_the_oracle_commits(llama, combine, evaluation):
    head = make_head(llama, combine)
    config = ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4, evaluation=evaluation)
    out = steer(llama, config, 5, **SAMPLING)
    oracle = Oracle(config)
    oracle.head = SimpleNamespace(
        config=head.config, net=lambda feature: torch.tensor(by_hand(head.net(feature).tolist(), combine))
    )
    assert torch.equal(out.sequences, steer(llama, None, 5, **SAMPLING, custom_generate=oracle))
    for row, values in enumerate(oracle.values):
        torch.testing.assert_close(out.token_values[row, : len(values)], torch.tensor(values), rtol=0, atol=1e-4)
        assert out.interventions[row, : len(values)].tolist() == oracle.interventions[row]
    assert out.interventions.any() and not out.interventions.all()


def test_every_token_passes_every_threshold_or_none_did(llama):
    head = make_head(llama, "worst")
    config = ValueFilterConfig(value_head=head, num_candidates=3, output_candidates=True)
    out = steer(llama, config, 5, **SAMPLING)
    starts = prompts(3)["attention_mask"].argmax(dim=1).tolist()
    length, seen = out.sequences.shape[1] - out.token_values.shape[1], {True: 0, False: 0}
    for row, step in (~out.token_values.isnan()).nonzero().tolist():
        before, token = out.sequences[row, starts[row] : length + step], out.sequences[row, length + step]
        candidates = out.candidates[row, step]
        verdicts = {
            int(each): passes(last_values(llama, head, torch.cat([before, each[None]])))
            for each in candidates[candidates >= 0]
        }
        committed = verdicts[int(token)]
        assert committed or not any(verdicts.values())
        seen[committed] += 1
    assert seen[True] > 5 and seen[False] > 0
