"""Natural samples and their alternatives."""

import torch

from hf_value_steer.generation.candidates import (
    likely_alternatives,
    natural_sample,
    random_key,
    sampled_alternatives,
    uniforms,
)


INF = torch.inf
CPU = torch.device("cpu")


def test_the_natural_sample_takes_the_numbers_that_generate_takes():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    torch.manual_seed(1)
    tokens, possible = natural_sample(scores, do_sample=True)
    assert torch.equal(tokens, expected) and possible.all()


def test_rows_without_any_token_are_reported():
    scores = torch.tensor([[0.0, -INF], [-INF, -INF]])
    for do_sample in (True, False):
        assert natural_sample(scores, do_sample)[1].tolist() == [True, False]


def test_the_key_follows_the_global_generator_without_touching_it():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    key = random_key(CPU, None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert random_key(CPU, None) != key
    torch.manual_seed(0)
    assert random_key(CPU, None) == key
    assert random_key(CPU, 3) == random_key(CPU, 3) != random_key(CPU, 4)


def test_random_numbers_depend_on_row_and_step_alone():
    key = random_key(CPU, 0)
    together = uniforms(key, [0, 1, 2], step=4, count=6)
    assert torch.equal(together[[2]], uniforms(key, [2], step=4, count=6))
    assert torch.equal(together[:, :3], uniforms(key, [0, 1, 2], step=4, count=3))
    assert not torch.equal(together, uniforms(key, [0, 1, 2], step=5, count=6))
    assert together.unique().numel() == together.numel()
    assert 0 <= together.min() and together.max() < 1


def test_inversion_never_lands_on_a_forbidden_token():
    scores = torch.tensor([[-INF, 0.0, -INF, 1.0, -INF]])
    uniform = torch.tensor([[0.0, 0.2, 0.3, 1 - 2**-24]], dtype=torch.float64)
    assert sampled_alternatives(scores, uniform).tolist() == [[1, 1, 3, 3]]


def test_likely_alternatives_skip_the_natural_token_and_stop_at_forbidden_ones():
    scores = torch.tensor([[3.0, 2.0, 1.0, -INF], [0.0, -INF, -INF, -INF]])
    assert likely_alternatives(scores, torch.tensor([1, 0]), 3).tolist() == [[0, 2, -1], [-1, -1, -1]]
    assert likely_alternatives(scores[:1, :2], torch.tensor([0]), 4).tolist() == [[1, -1, -1, -1]]
