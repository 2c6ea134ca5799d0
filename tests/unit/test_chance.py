"""Whether values are better than chance: from few texts, from several of one prompt, and whatever their lengths."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.training.chance import at_chance, can_be_told, chance_report, discrimination
from hf_value_steer.training.trainer import CHANCE_STEPS, HeadInTraining, StopAtChance, text_metrics


def test_auroc_by_hand():
    found = discrimination(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True]), np.arange(4))
    assert found.auroc == pytest.approx(3.5 / 4) and (found.positive, found.negative) == (2, 2)
    assert discrimination(np.array([0.1, 0.2]), np.array([False, False]), np.arange(2)).metrics() == {
        "positive_texts": 0,
        "negative_texts": 2,
    }


@pytest.mark.parametrize(("prompts", "samples", "shared"), [(40, 1, 0.0), (18, 6, 0.0), (18, 6, 1.0), (12, 4, 0.5)])
def test_values_that_know_nothing_are_seldom_above_chance(prompts, samples, shared):
    """Values and labels are independent of each other, but those of one prompt are more or less alike."""
    random, above, draws = np.random.default_rng(0), 0, 400
    owner = np.repeat(np.arange(prompts), samples)

    def draw():
        alike, own = random.normal(size=prompts)[owner], random.normal(size=len(owner))
        return shared**0.5 * alike + (1 - shared) ** 0.5 * own

    for _ in range(draws):
        above += discrimination(draw(), draw() > 0.3, owner).lower > 0.5
    assert above / draws < 0.09


def test_few_texts_show_nothing_even_without_an_error():
    for count, told in ((1, False), (2, False), (3, True), (30, True)):
        positive = np.arange(2 * count) >= count
        found = discrimination(np.arange(2 * count) / 100, positive, np.arange(2 * count))
        assert found.auroc == 1.0 and (found.lower > 0.5) == can_be_told(count, count) == told
    assert not can_be_told(0, 100) and not can_be_told(100, 0) and can_be_told(1, 20)


def test_texts_of_one_prompt_count_as_far_as_they_differ():
    random = np.random.default_rng(1)
    values, positive = random.normal(size=40), np.arange(40) % 2 == 0
    values[positive] += 0.7
    alone = discrimination(values, positive, np.arange(40))
    copied = discrimination(*(np.repeat(each, 5) for each in (values, positive, np.arange(40))))
    assert copied.auroc == pytest.approx(alone.auroc) and copied.lower == pytest.approx(alone.lower, abs=0.01)
    assert discrimination(*(np.repeat(each, 5) for each in (values, positive)), np.arange(200)).lower > alone.lower
    same = discrimination(np.repeat([0.2, 0.9], 8), np.repeat([False, True], 8), np.repeat([0, 1], 8))
    assert same.auroc == 1.0 and same.lower < 0.5  # two prompts, whatever they are copied to


def test_what_a_record_says():
    good = {"text_auroc": 0.8, "text_interval": [0.7, 1.0], "positive_texts": 30, "negative_texts": 60}
    bad = {"text_auroc": 0.55, "text_interval": [0.46, 1.0], "positive_texts": 3, "negative_texts": 9}
    none = {"text_auroc": None, "text_interval": None, "positive_texts": 0, "negative_texts": 9}
    assert at_chance(good) == [] and at_chance(bad) == at_chance(none) == [""]
    several = {f"{key}_{name}": value for name, of in (("a", good), ("b", bad)) for key, value in of.items()}
    assert at_chance(several) == ["_b"]
    report = chance_report({"metrics": several})
    assert report.startswith("attribute b, AUROC 0.55 (one-sided 95 % interval [0.46, 1]) of 3 validation texts")
    assert "AUROC unknown of 0 validation texts" in chance_report({"metrics": none})
    assert chance_report(None) == chance_report({}) == chance_report({"metrics": {"auroc": 0.5}}) == ""


class Texts:
    """A dataset of random features: positive texts are longer, and nothing else tells them apart."""

    def __init__(self, count, width):
        generator = torch.Generator().manual_seed(0)
        self.rows, self.labels = range(count), torch.arange(count) % 2 == 0
        lengths = [20 if positive else 4 for positive in self.labels]
        self.features = [torch.randn(length, width, generator=generator) for length in lengths]
        prompts = SimpleNamespace(rows=SimpleNamespace(prompt=torch.arange(count)))
        self.targets = SimpleNamespace(collection=prompts, positive=lambda rows: self.labels[:, None])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"features": self.features[index], "labels": torch.zeros(len(self.features[index]))}


def test_length_is_no_knowledge():
    texts, aurocs = Texts(300, 8), []
    for seed in range(10):
        torch.manual_seed(seed)
        head = ValueHead(ValueHeadConfig(hidden_size=8, architecture="linear"))
        model = HeadInTraining(head, torch.zeros(8), torch.ones(8), "bce", 1.0, 0.0)
        aurocs.append(text_metrics(model, texts)["text_auroc"])
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.03)


def test_a_training_at_chance_ends_before_its_last_epoch():
    def entry(lower):
        return {"eval_loss": 0.7, "eval_text_interval": [lower, 1.0]}

    for log, steps, stops in (
        ([entry(0.4)] * 3, CHANCE_STEPS, True),
        ([entry(0.4)] * 2, CHANCE_STEPS, False),
        ([entry(0.4)] * 3, CHANCE_STEPS - 1, False),
        ([entry(0.4), entry(0.6), entry(0.4)], CHANCE_STEPS, False),
    ):
        control = SimpleNamespace(should_training_stop=False)
        StopAtChance(3).on_evaluate(None, SimpleNamespace(log_history=log, global_step=steps), control)
        assert control.should_training_stop == stops
