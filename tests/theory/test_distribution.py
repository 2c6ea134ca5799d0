"""The law of the committed token on a vocabulary small enough to enumerate."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, enable_value_steer


VOCABULARY, DRAWS = 8, 20_000


@pytest.fixture(scope="module")
def toy():
    """A model, a head, the next-token distribution after one prompt, and the value of every next token."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    head = ValueHead(ValueHeadConfig(hidden_size=16, threshold=0.5))
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
        head.net[-1].weight.mul_(20)
        prompt = torch.tensor([[1, 5, 2]])
        probabilities = model(prompt).logits[0, -1].double().softmax(-1).numpy()
        texts = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        values = head(model.base_model(texts).last_hidden_state[:, -1]).value.double().numpy()
    return enable_value_steer(model), head, prompt, probabilities, values


def soft_law(probabilities, values, threshold, num_candidates, beta):
    """P(committed token): each of K i.i.d. candidates in turn is accepted by a draw; else the best of them."""
    odds = np.log(values / (1 - values)) - np.log(threshold / (1 - threshold))
    accepted = np.minimum(1.0, np.exp(-beta * odds))
    committed = np.zeros(VOCABULARY)
    for candidates in itertools.product(range(VOCABULARY), repeat=num_candidates):
        left = probabilities[list(candidates)].prod()
        for token in candidates:
            committed[token] += left * accepted[token]
            left *= 1 - accepted[token]
        committed[min(candidates, key=values.__getitem__)] += left
    return committed


def law(probabilities, values, threshold, num_candidates, prob_weight=None):
    """P(committed token): over all tuples of K i.i.d. candidates the first acceptable one, else the fallback."""
    score = values if prob_weight is None else values - prob_weight * probabilities
    committed = np.zeros(VOCABULARY)
    for candidates in itertools.product(range(VOCABULARY), repeat=num_candidates):
        accepted = [token for token in candidates if values[token] < threshold]
        token = accepted[0] if accepted else min(candidates, key=score.__getitem__)
        committed[token] += probabilities[list(candidates)].prod()
    return committed


def empirical(toy, **options):
    model, head, prompt, *_ = toy
    counts = np.zeros(VOCABULARY)
    torch.manual_seed(0)
    for _ in range(DRAWS // 1000):
        out = model.generate(
            prompt.expand(1000, -1), attention_mask=torch.ones(1000, 3, dtype=torch.long), max_new_tokens=1,
            do_sample=True, top_k=0, value_steer=ValueFilterConfig(value_head=head, **options),
        )  # fmt: skip
        counts += np.bincount(out[:, -1].numpy(), minlength=VOCABULARY)
    return counts


def assert_follows(counts, expected):
    assert counts[expected < 1e-12].sum() == 0
    support = expected >= 1e-12
    assert chisquare(counts[support], expected[support] * DRAWS).pvalue > 0.001


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("num_candidates", [1, 2, 4])
def test_first_acceptable_of_k(toy, num_candidates, evaluation):
    _, _, _, probabilities, values = toy
    threshold = float(np.sort(values)[3:5].mean())
    expected = law(probabilities, values, threshold, num_candidates)
    counts = empirical(toy, threshold=threshold, num_candidates=num_candidates, evaluation=evaluation)
    assert_follows(counts, expected)
    if num_candidates > 1:  # and the test can tell it from the law of one candidate fewer
        other = law(probabilities, values, threshold, num_candidates - 1)
        assert chisquare(counts, other * DRAWS).pvalue < 0.001


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("num_candidates", [1, 3])
def test_soft_selection(toy, num_candidates, beta, evaluation):
    _, _, _, probabilities, values = toy
    threshold = float(np.sort(values)[1:3].mean())
    expected = soft_law(probabilities, values, threshold, num_candidates, beta)
    options = {"threshold": threshold, "num_candidates": num_candidates, "evaluation": evaluation}
    counts = empirical(toy, **options, selection="soft", beta=beta)
    assert_follows(counts, expected)
    if num_candidates > 1:  # and the test can tell it from the hard law, and from that of another beta
        for other in (
            law(probabilities, values, threshold, num_candidates),
            soft_law(probabilities, values, threshold, num_candidates, beta / 3),
        ):
            support = other > 1e-12
            assert counts[~support].any() or chisquare(counts[support], other[support] * DRAWS).pvalue < 0.001


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("num_candidates", [2, 4])
def test_soft_selection_among_the_most_likely(toy, num_candidates, evaluation):
    _, _, _, probabilities, values = toy
    options = {"threshold": 0.5, "num_candidates": num_candidates, "evaluation": evaluation}
    counts = empirical(toy, **options, selection="soft", beta=0.7, proposal="topk")

    def reweighed(beta):
        likely = np.argsort(-probabilities)[:num_candidates]
        weights = np.zeros(VOCABULARY)
        weights[likely] = probabilities[likely] * (values[likely] / (1 - values[likely])) ** -beta
        return weights / weights.sum()

    assert_follows(counts, reweighed(0.7))
    support = reweighed(0.7) > 0
    assert chisquare(counts[support], reweighed(0.5)[support] * DRAWS).pvalue < 0.001


def test_the_args_fallback(toy):
    _, _, _, probabilities, values = toy
    threshold = float(values.min()) / 2
    expected = law(probabilities, values, threshold, 3, prob_weight=2.0)
    counts = empirical(toy, threshold=threshold, num_candidates=3, fallback="args", prob_weight=2.0)
    assert_follows(counts, expected)
    assert chisquare(counts, law(probabilities, values, threshold, 3) * DRAWS).pvalue < 0.001


def test_total_variation_to_the_filtered_policy_falls_with_k(toy):
    _, _, _, probabilities, values = toy
    threshold = float(np.sort(values)[3:5].mean())
    filtered = probabilities * (values < threshold)
    filtered /= filtered.sum()
    distances = []
    for num_candidates in (1, 2, 4, 8):
        counts = empirical(toy, threshold=threshold, num_candidates=num_candidates)
        distances.append(np.abs(counts / DRAWS - filtered).sum() / 2)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.2 > 0.05 > distances[-1]
