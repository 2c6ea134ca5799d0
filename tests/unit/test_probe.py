import torch

from hf_value_steer.training.probe import held_out_scores


def test_a_probe_finds_what_is_linear_and_not_what_is_chance():
    torch.manual_seed(0)
    states, fold = torch.randn(600, 12) * 5 + 3, torch.arange(600) % 4
    label = states @ torch.randn(12) > 0
    scores = held_out_scores(states, label, fold)
    assert scores[label].mean() > scores[~label].mean() + 0.3
    label = torch.rand(600) < 0.5
    scores = held_out_scores(states, label, fold)
    assert abs(scores[label].mean() - scores[~label].mean()) < 0.05


def test_a_fold_is_scored_by_the_others():
    torch.manual_seed(0)
    states, fold, label = torch.randn(60, 5), torch.arange(60) % 3, torch.rand(60) < 0.5
    changed = label.clone()
    changed[(fold == 1).nonzero().flatten()[:2]] ^= torch.tensor([True, True])
    before, after = (held_out_scores(states, each, fold) for each in (label, changed))
    torch.testing.assert_close(after[fold == 1], before[fold == 1])
    assert not torch.allclose(before[fold != 1], after[fold != 1], atol=1e-3)
