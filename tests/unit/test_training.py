import pytest
import torch
from transformers import EvalPrediction

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.training.label import completes_word
from hf_value_steer.training.losses import coherence, token_loss
from hf_value_steer.training.targets import expected_hazard, hazard, onset
from hf_value_steer.training.train import _training_arguments
from hf_value_steer.training.trainer import HeadInTraining, feature_moments, join_rows, reliability, token_metrics


def test_hazard_is_the_rise_at_the_token_or_soon_after_it():
    prefixes = torch.tensor([0.1, 0.1, 0.6, 0.5, 0.5, 0.5])
    assert hazard(prefixes, horizon=1).tolist() == pytest.approx([0.1, 0.5, 0.5, 0.0, 0.0, 0.0])
    assert hazard(prefixes[:1]).tolist() == pytest.approx([0.1])


def test_expected_hazard_by_hand():
    # Token 1 raises the score by 0.8. After token 0 the model says 7 with 0.9 (it did: token 1), and 8 with 0.1.
    prefixes, tokens = torch.tensor([0.1, 0.9]), torch.tensor([5, 7])
    following = torch.tensor([[0.9, 0.3], [0.9, 0.9]])
    next_tokens, probabilities = torch.tensor([[7, 8], [1, 2]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    labels = expected_hazard(prefixes, following, tokens, next_tokens, probabilities)
    assert labels.tolist() == pytest.approx([(0.9 * 0.8 + 0.1 * 0.2) ** 2, 0.8])


def test_expected_hazard_uses_what_the_drawn_token_led_to():
    # The drawn token 7 does not raise the score itself, but is bound to be followed by one that does.
    prefixes, tokens = torch.tensor([0.0, 0.0]), torch.tensor([5, 7])
    following = torch.tensor([[0.0], [1.0]])
    labels = expected_hazard(prefixes, following, tokens, torch.tensor([[7], [9]]), torch.tensor([[0.5], [1.0]]))
    assert labels.tolist() == pytest.approx([0.25, 1.0])


def test_an_onset_is_the_end_of_the_first_word_that_the_judge_objects_to():
    prefixes = torch.tensor([0.1, 0.9, 0.9, 0.2, 0.9])
    completes = torch.tensor([True, False, True, True, True])
    labels = onset(prefixes, completes)
    assert labels[:3].tolist() == [0, 0, 1] and labels[3:].isnan().all()
    cut = onset(prefixes[:2], completes[:2])  # in the middle of the word: nobody knows how it goes on
    assert cut[0] == 0 and cut[1].isnan()


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        ([" as", "sume", " so", "."], [False, True, True, True]),
        ([" don", "'t"], [True, False]),  # the text was cut behind a letter
        ([" end", ""], [True, True]),  # an end of sequence adds no text
        (["\n", "1", "0", ","], [True, False, True, True]),
        ([], []),
    ],
)
def test_which_tokens_complete_a_word(pieces, ends):
    assert completes_word(pieces) == ends


def test_labels_that_are_not_there_count_nowhere():
    head = ValueHead(ValueHeadConfig(hidden_size=3))
    model = HeadInTraining(head, torch.zeros(3), torch.ones(3), "bce", 1.0, 0.0)
    features, labels = torch.randn(4, 3), torch.tensor([0.0, 1.0, torch.nan, torch.nan])
    whole, part = (model(**join_rows([{"features": features[:count], "labels": labels[:count]}])) for count in (4, 2))
    assert whole["loss"] == part["loss"] and whole["logits"].shape == (4,)
    found = [token_metrics(EvalPrediction(each["logits"].detach().numpy(), labels[:count].numpy()))
             for each, count in ((whole, 4), (part, 2))]  # fmt: skip
    assert found[0] == found[1] and set(found[0]) == {"auroc", "calibration_error"}


def test_losses_by_hand():
    logits, targets = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    value = torch.tensor(2.0).sigmoid()
    plain = token_loss(logits, targets, "bce")
    assert plain.tolist() == pytest.approx([0.6931472, float(-torch.log(1 - value))])
    focal = token_loss(logits, targets, "focal", positive_weight=3.0)
    assert focal.tolist() == pytest.approx([3 * 0.6931472 * 0.5, float(-torch.log(1 - value) * value)])


def test_coherence_stays_within_rows():
    logits = torch.tensor([0.0, 1.0, 5.0, 7.0])
    follows = torch.tensor([False, True, False, True])
    assert coherence(logits, follows).item() == pytest.approx((1 + 4) / 2)
    assert coherence(logits[:1], follows[:1]).item() == 0


def test_rows_are_joined_with_their_borders():
    items = [{"features": torch.full((n, 2), n), "labels": torch.full((n,), n)} for n in (2, 1, 3)]
    joined = join_rows(items)
    assert joined["labels"].tolist() == [2, 2, 1, 3, 3, 3]
    assert joined["follows"].tolist() == [False, True, False, False, True, True]
    assert joined["lengths"].tolist() == [2, 1, 3] and joined["labelled"].all()


def test_a_prompt_without_a_label_is_seen_and_not_learned():
    items = [{"features": torch.randn(n + 1, 2), "labels": torch.rand(n)} for n in (2, 1)]
    joined = join_rows(items)
    assert joined["labelled"].tolist() == [False, True, True, False, True]
    assert joined["follows"].tolist() == [False, True, False]
    head = ValueHead(ValueHeadConfig(hidden_size=2, temporal="mean"))
    out = HeadInTraining(head, torch.zeros(2), torch.ones(2), "bce", 1.0, 0.0)(**joined)
    alone = torch.cat([head(item["features"]).logits[1:] for item in items])
    torch.testing.assert_close(out["logits"], alone)
    torch.testing.assert_close(out["loss"], token_loss(alone, joined["labels"], "bce").mean())


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
@pytest.mark.parametrize("architecture", ["mlp", "linear"])
def test_a_folded_head_reads_features_as_they_are(architecture, temporal):
    torch.manual_seed(0)
    features, mean, scale = torch.randn(7, 6) * 3 + 5, torch.randn(6), torch.rand(6) + 0.5
    head = ValueHead(ValueHeadConfig(hidden_size=6, architecture=architecture, temporal=temporal))
    model = HeadInTraining(head, mean, scale, "bce", 1.0, 0.0)
    expected = model(**join_rows([{"features": features, "labels": torch.ones(7)}]))["logits"]
    assert torch.allclose(model.folded()(features).logits, expected, atol=1e-5)


def test_moments_and_norms_of_each_layer():
    rows = [{"features": torch.randn(n, 5) * 3 + 1} for n in (4, 7)]
    mean, scale, norms = feature_moments(rows, [2, 3])
    every = torch.cat([row["features"] for row in rows])
    torch.testing.assert_close(mean, every.mean(0))
    torch.testing.assert_close(scale, every.std(0, correction=0))
    assert norms == pytest.approx([float(part.norm(dim=1).mean()) for part in every.split([2, 3], dim=1)], rel=1e-5)


def test_reliability_by_hand():
    bins = reliability(torch.tensor([0.05, 0.05, 0.95, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert bins.count == [2, 2] and bins.rate == [0.5, 1.0] and bins.lower == pytest.approx([0.0, 0.9])
    assert bins.error == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)


def test_a_preset_is_many_settings():
    arguments = TrainArguments(collection="c", output="o", judge="j", preset="hazard", epochs=3)
    assert arguments.settings().epochs == 3 and arguments.settings().target == "hazard"
    with pytest.raises(ValueError, match="`preset` has to be one of value-steer, hazard, onset, got 'best'"):
        TrainArguments(collection="c", output="o", judge="j", preset="best")
    with pytest.raises(ValueError, match="leave prompts to train on"):
        TrainArguments(collection="c", output="o", judge="j", validation=0.5, calibration=0.5)


def test_further_arguments_are_json_or_text(tmp_path):
    further = ["logging_strategy=no", "logging_steps=7", "full_determinism=true", "run_name=x=y"]
    found = _training_arguments(TrainArguments(collection="c", output="o", judge="j", trainer=further), tmp_path)
    assert (found.logging_strategy, found.logging_steps, found.full_determinism) == ("no", 7, True)
    assert found.run_name == "x=y"
