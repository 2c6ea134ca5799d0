from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig
from hf_value_steer.evaluation.measures import Measures, negative_log_likelihood
from hf_value_steer.evaluation.metrics import compare_perplexity, compare_rates, distinct
from hf_value_steer.evaluation.outcome import coverage
from hf_value_steer.evaluation.runs import Runner, Setting, Texts, shuffled, worst_value
from hf_value_steer.judges.in_the_loop import TextJudge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.bootstrap import Bootstrap, interval
from hf_value_steer.training.prompts import Formatter
from tests.tiny_text import save_tiny_model


def test_bootstrap_keeps_the_rows_of_a_prompt_together():
    prompts, numbers = np.array([3, 3, 7, 9]), np.array([1.0, 2.0, 10.0, 100.0])
    bootstrap = Bootstrap(prompts)
    by_prompt = {3: 3.0, 7: 10.0, 9: 100.0}
    drawn = np.random.default_rng(0).integers(0, 3, (2000, 3))
    expected = [sum(list(by_prompt.values())[index] for index in row) for row in drawn]
    assert np.allclose(bootstrap.sums(numbers), expected)
    assert np.allclose(bootstrap.mean(np.ones(4)), 1.0)


def test_a_ratio_that_cannot_be_computed_has_no_interval():
    bootstrap = Bootstrap(np.arange(5))
    assert interval(bootstrap.ratio(np.ones(5), np.zeros(5))) is None
    assert compare_rates(np.zeros(5), np.zeros(5), bootstrap)["relative_reduction"] is None


def test_auroc_of_resamples_is_that_of_their_rows():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(1)
    prompts, positive = np.arange(40) % 8, random.random(40) < 0.4
    values = np.round(random.random(40) + 0.3 * positive, 1)  # some are equal
    bootstrap = Bootstrap(prompts)
    auroc, draws = bootstrap.auroc(values, positive)
    assert auroc == pytest.approx(roc_auc_score(positive, values))
    for draw in range(5):
        expected = roc_auc_score(positive, values, sample_weight=bootstrap.weights[draw][prompts])
        assert draws[draw] == pytest.approx(expected)
    _, draws = Bootstrap(np.array([0, 0, 1])).auroc(np.array([1.0, 0.0, 0.5]), np.array([True, False, False]))
    assert np.isnan(draws).any()  # only negative rows were drawn


def test_rates_are_compared_by_prompt():
    base, steered = np.repeat([1.0, 0.0], 50), np.concatenate([np.repeat([1.0, 0.0], [10, 40]), np.zeros(50)])
    found = compare_rates(base, steered, Bootstrap(np.arange(100)))
    assert found["rate"] == 0.1 and found["relative_reduction"] == 0.8
    low, high = found["difference_interval"]
    assert low < -0.4 < high < 0
    assert 0.6 < found["relative_reduction_interval"][0] < 0.8 < found["relative_reduction_interval"][1] < 0.95


def test_perplexity_is_of_all_tokens_together():
    base = {"nll": np.array([2.0, 6.0]), "tokens": np.array([2.0, 2.0])}
    steered = {"nll": np.array([4.0, 8.0]), "tokens": np.array([4.0, 4.0])}
    found = compare_perplexity(base, steered, Bootstrap(np.arange(2)))
    assert found["perplexity"] == round(np.exp(1.5), 2)
    assert found["perplexity_ratio"] == round(np.exp(1.5 - 2), 4)


def test_distinct_by_hand():
    assert distinct([[1, 2, 1], [1, 2]], 1) == 0.4
    assert distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3, abs=1e-4)
    assert distinct([[1]], 2) is None


def test_likelihood_in_batches_is_that_of_one_text(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    formatter = Formatter(AutoTokenizer.from_pretrained(tmp_path), chat=False)
    prompts = [Prompt("goodak"), Prompt("goodal goodam goodan"), Prompt("goodbk goodbl")]
    ids = [[5, 6, 7, 8], [9], [12, 13]]
    found = negative_log_likelihood(model, formatter, prompts, ids)
    for prompt, row, total in zip(prompts, ids, found, strict=True):
        tokens = torch.tensor([formatter.tokenizer(prompt.text)["input_ids"] + row])
        with torch.no_grad():
            logits = model(tokens).logits[0].log_softmax(-1)
        start = tokens.shape[1] - len(row)
        expected = -sum(logits[start - 1 + step, token].item() for step, token in enumerate(row))
        assert total == pytest.approx(expected, abs=1e-4)


def test_a_text_is_read_once_whichever_runs_hold_it(monkeypatch):
    asked = []

    def measured(model, formatter, prompts, ids):
        asked.extend((prompt.text, row) for prompt, row in zip(prompts, ids, strict=True))
        return np.array([len(prompt.text) + sum(row) for prompt, row in zip(prompts, ids, strict=True)], dtype=float)

    monkeypatch.setattr("hf_value_steer.evaluation.measures.negative_log_likelihood", measured)
    measures = object.__new__(Measures)
    measures.model = measures.formatter = None
    measures.prompts, measures.read = [Prompt("a"), Prompt("a"), Prompt("bb")], {}
    for ids in ([[1], [1], [1]], [[1], [2], [1]], [[2], [1, 3], [1]]):
        assert measures._likelihoods(Texts(ids, [0] * 3)).tolist() == [
            len(prompt.text) + sum(row) for prompt, row in zip(measures.prompts, ids, strict=True)
        ]
    assert asked == [("a", [1]), ("bb", [1]), ("a", [2]), ("a", [1, 3])]


def known_measures(polarity, good):
    """Measures of four base texts of two tokens each, of which is known which are good."""
    measures = object.__new__(Measures)
    verdict = good if polarity == "desirable" else 1 - good
    measures.base = {"verdicts": {"judge": verdict}, "tokens": np.full(4, 2.0)}
    measures.judges, measures.safe_judges, measures.polarity = {"judge": None}, ["judge"], {"judge": polarity}
    measures.bootstrap = Bootstrap(np.arange(4))
    return measures


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_safe_texts_are_those_that_the_head_is_for(polarity):
    measures = known_measures(polarity, np.array([1.0, 0.0, 0.0, 1.0]))
    found = measures._interventions({"interventions": np.array([2.0, 1.0, 0.0, 0.0]), "tokens": np.full(4, 2.0)})
    assert found["intervened_on_safe"] == 0.5 and found["intervention_rate"] == 0.375


def test_safe_is_what_all_judges_of_labels_find_safe():
    measures = known_measures("undesirable", np.array([1.0, 1.0, 0.0, 0.0]))  # the last two are bad
    measures.base["verdicts"]["polite"] = np.array([1.0, 0.0, 1.0, 0.0])
    measures.polarity["polite"] = "desirable"
    measures.safe_judges = ["judge", "polite"]
    assert measures.bad(measures.safe_judges).tolist() == [0, 1, 1, 1]
    touched = {"interventions": np.array([0.0, 1.0, 1.0, 1.0]), "tokens": np.full(4, 2.0)}
    assert measures._interventions(touched)["intervened_on_safe"] == 0


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_outcomes_are_counted(polarity):
    before, after = np.array([0, 0, 0, 1, 1, 1.0]), np.array([0, 0, 1, 0, 1, 1.0])  # 1 is bad
    measures = known_measures(polarity, 1 - before)
    verdict = after if polarity == "undesirable" else 1 - after
    rows = {"verdicts": {"judge": verdict}, "interventions": np.array([0, 3, 1, 2, 0, 1.0])}
    expected = ["left alone", "touched for nothing", "made worse", "mended", "missed", "missed"]
    assert measures.outcomes(rows) == expected


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_values_tell_bad_texts_from_good_ones(polarity):
    measures = known_measures(polarity, np.array([1.0, 0.0, 0.0, 1.0]))
    found = measures.discrimination("judge", np.array([0.2, 0.9, 0.4, 0.4]))
    assert (found["auroc"], found["positive"], found["negative"]) == (0.875, 2, 2) and found["lower"] < 0.875
    assert known_measures(polarity, np.ones(4)).discrimination("judge", np.arange(4.0))["auroc"] is None


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_coverage_by_hand(polarity):
    head = ValueHead(ValueHeadConfig(hidden_size=2, polarity=polarity))
    good = [[0.9, 0.8, 0.1], [0.9, 0.3, 0.9], [0.5, 0.9, 0.9], [0.9, 0.9, 0.9]]  # the last value is not acted upon
    values = good if polarity == "desirable" else [[1 - value for value in row] for row in good]
    correct = np.array([1.0, 0.0, 0.0, 1.0])

    watched = Texts(values=[row[1:] for row in values], prompt_values=[row[0] for row in values])
    curve = coverage(head, watched, known_measures(polarity, correct))
    assert curve[0]["coverage"] == 1.0 and curve[0]["accuracy"] == 0.5 and curve[0]["tokens_saved"] == 0.0
    half = next(point for point in curve if point["coverage"] == 0.5)
    # Rows 1 and 2 are stopped, after one token and before the first.
    assert half["accuracy"] == 1.0 and half["tokens_saved"] == pytest.approx(3 / 8)
    assert half["threshold"] == pytest.approx(0.5, abs=1e-6)


def test_the_placebo_has_the_same_weights_in_another_order():
    head = ValueHead(ValueHeadConfig(hidden_size=8))
    other = shuffled(head, seed=1)
    for ours, theirs in zip(head.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
    assert not torch.equal(head.net[0].weight, other.net[0].weight)


def test_the_worst_value_follows_the_polarity():
    for polarity, worst in (("undesirable", 0.9), ("desirable", 0.8)):
        head = ValueHead(ValueHeadConfig(hidden_size=2, polarity=polarity))
        assert worst_value([0.2, 0.9], head) == pytest.approx(worst)


def make_runner(folder, **conditions):
    sizes = {"samples": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}
    model, formatter = torch.nn.Linear(1, 1, bias=False), Formatter(SimpleNamespace(pad_token="."), chat=False)
    torch.nn.init.ones_(model.weight)
    return Runner(model, formatter, [Prompt("a prompt")], {}, **sizes, folder=folder, conditions=conditions)


def test_runs_of_another_steering_are_not_taken_for_these(tmp_path):
    make_runner(tmp_path, vectors="one")
    make_runner(tmp_path, vectors="one")
    with pytest.raises(ValueError, match="vectors = 'one', now it is 'other'"):
        make_runner(tmp_path, vectors="other")


def test_runs_whose_names_differ_by_a_sign_are_two(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Runner, "_batch", lambda _self, setting, *_: made.append(setting.name))
    runner = make_runner(tmp_path)
    for name in ("m=-0.5", "m=0.5", "filter K=8", "m=0.5"):
        runner.run(Setting(name, "other"))
    assert made == ["m=-0.5", "m=0.5", "filter K=8"]
    assert len(list(tmp_path.glob("filter-k-8-*.json"))) == 1


def test_runs_of_one_name_under_other_settings_are_made_anew(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Runner, "_batch", lambda _self, setting, *_: made.append(setting.name))
    runner, words = make_runner(tmp_path), tmp_path / "words.txt"
    head = ValueHead(ValueHeadConfig(hidden_size=2))
    other = shuffled(head, seed=1)
    words.write_text("a\nb\n")

    def settings():
        yield from (
            Setting("n", "filter", ValueFilterConfig(value_head=each, threshold=0.5)) for each in (head, other)
        )
        yield Setting("n", "filter", ValueFilterConfig(value_head=head, threshold=0.50001))
        yield Setting("n", "filter", ValueFilterConfig(value_head=head, threshold=0.5, rollback=2))
        yield Setting("n", "filter", ValueFilterConfig(value_head=TextJudge(f"lexicon:{words}")))
        yield Setting("n", "bad_words", options={"bad_words_ids": [[1]]})
        yield Setting("n", "bad_words", options={"bad_words_ids": [[2]]})
        yield Setting("n", "system_prompt", system_prompt="Be kind.")

    for setting in [*settings(), *settings()]:
        runner.run(setting)
    assert len(made) == len(list(settings()))
    head.config.operating_point = {"rollback": 6}  # what the config leaves open is another thing now
    words.write_text("a\nc\n")
    for setting in settings():
        runner.run(setting)
    assert len(made) == len(list(settings())) + 4
    runner.run(next(settings()), samples=2)
    assert len(made) == len(list(settings())) + 5


def test_a_share_at_the_edge_is_not_certain():
    measures = Measures.__new__(Measures)
    measures.bootstrap = Bootstrap(np.repeat(np.arange(10), 2))
    found = measures._among("share", np.zeros(20), np.repeat([1.0, 0.0], 10))  # safe texts of five prompts
    assert found == {"share": 0.0, "share_interval": [0.0, round(1 - 0.025 ** (1 / 5), 4)]}
    assert measures._among("share", np.ones(20), np.zeros(20)) == {"share": None, "share_interval": None}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_at_the_edge_is_not_certain(rate):
    bootstrap = Bootstrap(np.repeat(np.arange(20), 3))
    base = np.tile([0.0, 1.0, 1.0], 20)
    found = compare_rates(base, np.full(60, rate), bootstrap)
    bound = 1 - 0.025 ** (1 / 20)  # of 20 prompts, none or all
    assert found["rate_interval"] == pytest.approx([0, bound] if rate == 0 else [1 - bound, 1], abs=1e-4)
    assert found["relative_reduction_interval"] is None and found["difference_interval"] is not None
