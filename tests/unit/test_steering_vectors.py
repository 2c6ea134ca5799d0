"""Steering vectors: what they are made of, saved and loaded, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from hf_value_steer.activation import SteeringVectors
from hf_value_steer.activation.norms import mean_norms, relative_influence
from hf_value_steer.activation.residual import layer_range, pad_right, read_residuals
from hf_value_steer.arguments.evaluate import MULTIPLIERS, SweepArguments
from hf_value_steer.arguments.vectors import ApplyArguments
from hf_value_steer.training.vectors import vectors_from_pairs, vectors_from_value_head
from tests.families import FAMILIES, build, layered_head
from tests.tiny_models import build_tiny


SEQUENCES = [[5, 17, 3, 44, 71, 8], [9, 10, 60], [88, 23, 4, 4, 52, 66, 31, 90, 12]]
CALIBRATED = [*FAMILIES, "phi", "gpt_neox", "bloom", "mixtral", "olmo2", "cohere", "stablelm", "mamba"]


def random_vectors(model, layers=(0, 1), **recorded):
    generator = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    return SteeringVectors.from_tensors({n: torch.randn(width, generator=generator) for n in layers}, **recorded)


class Words:
    """A tokenizer of numbers: `"5 17 3"`."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("family", CALIBRATED)
def test_relative_influence_is_rho_at_every_layer(family):
    model = build(family) if family in FAMILIES else build_tiny(family)
    vectors = random_vectors(model).scale(model, SEQUENCES)
    measured = relative_influence(model, vectors, SEQUENCES, 2.0)
    torch.testing.assert_close(measured, 2.0 * vectors.rho, rtol=0.02, atol=0)
    assert vectors.rho == pytest.approx(model.config.hidden_size**-0.5)
    by_rho = vectors.scaled_to(mean_norms(model, SEQUENCES), rho=0.3)
    torch.testing.assert_close(relative_influence(model, by_rho, SEQUENCES), torch.full((2,), 0.3), rtol=0.02, atol=0)


def test_flat_strength_sinks_where_the_norm_grows():
    model = build("llama")
    flat = dataclasses.replace(random_vectors(model), strengths=torch.ones(2))
    norms = mean_norms(model, SEQUENCES)
    measured = relative_influence(model, flat, SEQUENCES)
    assert norms[1] > 1.2 * norms[0]
    assert measured[0] > 1.2 * measured[1]


def test_mean_norms_count_text_only():
    model = build("gpt2")
    alone = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0, 1:] for row in SEQUENCES]
    expected = torch.cat(alone).norm(dim=-1).mean()
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(mean_norms(model, SEQUENCES, batch_size)[0], expected)
    with pytest.raises(ValueError, match="longer texts"):
        mean_norms(model, [[5], [6]])


def test_mean_difference_and_pooling():
    model = build("llama")
    positive, negative = ["5 17 3 44", "9 10 60"], ["7 7", "61 5 9 9 1"]
    last = vectors_from_pairs(model, Words(), positive, negative, layers=[0, 1])
    mean = vectors_from_pairs(model, Words(), positive, negative, layers=[0], pooling="mean")
    states = {}
    for text in (*positive, *negative):
        ids = torch.tensor([[int(word) for word in text.split()]])
        states[text] = model(ids, output_hidden_states=True).hidden_states[1][0]
    ends = {text: hidden[-1] for text, hidden in states.items()}
    whole = {text: hidden[1:].mean(dim=0) for text, hidden in states.items()}
    for found, by_text in ((last, ends), (mean, whole)):
        difference = sum(by_text[text] for text in positive) / 2 - sum(by_text[text] for text in negative) / 2
        torch.testing.assert_close(found.strengths[0] * found.directions[0], difference.detach())
    assert last.num_layers == 2 and last.backbone_fingerprint and last.provenance["method"] == "mean_difference"


@pytest.mark.parametrize("method", ["pca", "logistic"])
def test_other_methods_point_from_negative_to_positive(method):
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    bodies = [" ".join(map(str, torch.randint(5, 100, (5,), generator=generator).tolist())) for _ in range(24)]
    positive, negative = [f"{body} 44" for body in bodies], [f"{body} 45" for body in bodies]
    mean = vectors_from_pairs(model, Words(), positive, negative, layers=[0, 1])
    found = vectors_from_pairs(model, Words(), positive, negative, layers=[0, 1], method=method)
    cosines = (mean.directions * found.directions).sum(dim=-1)
    assert (cosines > 0.5).all(), cosines
    torch.testing.assert_close(found.strengths, mean.strengths, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("reads", "temporal"), [(["final"], "none"), (["final"], "mean"), ([1], "none"), ([1, "final"], "ema")]
)
def test_value_head_gradient_raises_the_value(reads, temporal):
    model = build("llama").requires_grad_(False)
    head = layered_head(model, reads, temporal)
    vectors = vectors_from_value_head(model, head, SEQUENCES, layers=[0, 1]).scale(model, SEQUENCES)
    mask = pad_right(SEQUENCES, model.device)[1]

    def mean_logit() -> float:
        ((states, final, _),) = read_residuals(model, SEQUENCES, [1])
        features = torch.cat([final if layer == "final" else states[layer] for layer in reads], dim=-1)
        return head(features).logits[mask.bool()].mean().item()

    plain = mean_logit()
    with vectors.apply(model, 0.5):
        assert mean_logit() > plain
    with vectors.apply(model, -0.5):
        assert mean_logit() < plain
    assert vectors.provenance["head"] == head.fingerprint()


def test_a_head_says_nothing_of_layers_above_its_own():
    model = build("llama").requires_grad_(False)
    head = layered_head(model, [0])
    assert vectors_from_value_head(model, head, SEQUENCES).layers == (0,)
    with pytest.raises(ValueError, match="the head reads layer 0 at most"):
        vectors_from_value_head(model, head, SEQUENCES, layers=[0, 1])


@pytest.mark.parametrize("edited", [False, True])
def test_a_generated_card_is_renewed_and_what_a_person_wrote_stays(tmp_path, edited):
    model = build("llama")
    vectors, card = random_vectors(model, attribute="calm"), tmp_path / "README.md"
    vectors.save_pretrained(tmp_path)
    assert "not calibrated" in card.read_text()
    if edited:
        text = card.read_text().replace("## Limits", "Use it with care.\n\n## Limits")
        card.write_text(text.replace("tags:", "license: mit\ntags:"))
    scaled = SteeringVectors.from_pretrained(tmp_path).scale(model, SEQUENCES, rho=0.2)
    for rho in (0.2, 0.3):  # scaled, and once more
        scaled.scale(model, SEQUENCES, rho).save_pretrained(tmp_path)
        assert f"what is added is {100 * rho:g} % of" in card.read_text()
    text = card.read_text()
    assert "not calibrated" not in text and f'"rho": {0.3}' in text and "20 % of" not in text
    assert ("Use it with care." in text) == ("license: mit" in text) == edited
    if not edited:
        assert text == str(SteeringVectors.from_pretrained(tmp_path).card())


def test_a_card_of_a_persons_own_is_left_alone(tmp_path):
    vectors = random_vectors(build("llama"))
    (tmp_path / "README.md").write_text("Mine.\n")
    for _ in range(2):
        vectors.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine.\n"
    (tmp_path / "steering_vectors.json").write_text("{}")  # damaged: nothing is known of what was there
    vectors.save_pretrained(tmp_path)
    assert SteeringVectors.from_pretrained(tmp_path).layers == vectors.layers


def test_saved_and_loaded(tmp_path):
    model = build("llama")
    vectors = random_vectors(model, attribute="calm", num_layers=2).scale(model, SEQUENCES)
    vectors.save_pretrained(tmp_path)
    loaded = SteeringVectors.from_pretrained(tmp_path)
    for name in ("directions", "strengths", "norms"):
        assert torch.equal(getattr(loaded, name), getattr(vectors, name))
    assert (loaded.layers, loaded.attribute, loaded.provenance) == ((0, 1), "calm", vectors.provenance)
    assert "calm" in (tmp_path / "README.md").read_text()
    document = json.loads((tmp_path / "steering_vectors.json").read_text())
    (tmp_path / "steering_vectors.json").write_text(json.dumps({**document, "layers": [0, 1, 2]}))
    with pytest.raises(ValueError, match="damaged"):
        SteeringVectors.from_pretrained(tmp_path)
    (tmp_path / "steering_vectors.json").write_text(json.dumps({**document, "format": "other"}))
    with pytest.raises(ValueError, match="format"):
        SteeringVectors.from_pretrained(tmp_path)


def test_layer_range():
    assert layer_range(30) == tuple(range(12, 27))
    assert layer_range(2) == (1,)
    assert layer_range(1) == (0,)
    assert layer_range(10, 0.0, 1.0) == tuple(range(10))
    with pytest.raises(ValueError, match="fractions"):
        layer_range(10, 0.9, 0.4)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({0: torch.zeros(4)}, "zero"),
        ({0: torch.tensor([1.0, torch.nan])}, "NaN"),
        ({0: torch.ones(4), 1: torch.ones(5)}, "one width"),
        ({-1: torch.ones(4)}, "not negative"),
    ],
)
def test_bad_tensors(vectors, message):
    with pytest.raises(ValueError, match=message):
        SteeringVectors.from_tensors(vectors)


def test_bad_pairs():
    model = build("llama")
    with pytest.raises(ValueError, match="both are needed"):
        vectors_from_pairs(model, Words(), ["5"], [])
    with pytest.raises(ValueError, match="needs pairs"):
        vectors_from_pairs(model, Words(), ["5"], ["6", "7"], method="pca")
    with pytest.raises(ValueError, match="`method`"):
        vectors_from_pairs(model, Words(), ["5"], ["6"], method="median")
    with pytest.raises(ValueError, match="`read_token_index`"):
        vectors_from_pairs(model, Words(), ["5"], ["6"], read_token_index=-2)
    with pytest.raises(ValueError, match="among 0 to 1"):
        vectors_from_pairs(model, Words(), ["5"], ["6"], layers=[2])
    with pytest.raises(ValueError, match="zero"):
        vectors_from_pairs(model, Words(), ["5 6"], ["5 6"])


LIBRARY = [path for kind in ("*.py", "*.md") for path in sorted(Path("hf_value_steer").rglob(kind))]
DOCUMENTS = [Path("README.md"), *sorted(Path("docs").glob("*.md")), *LIBRARY]
NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"


def measured():
    """Perplexity relative to base by multiplier, in the table of the documentation."""
    rows = re.findall(
        rf"^\| broadcast m=({NUMBER}) \|.*\| x({NUMBER}) \|", Path("docs/activation.md").read_text(), re.MULTILINE
    )
    return {float(multiplier): float(ratio) for multiplier, ratio in rows}


def shown(text):
    """The multipliers of calls and commands in a text."""
    found = re.findall(rf"(?:multiplier=|bake\(model, |--multipliers? )({NUMBER}(?: {NUMBER})*)", text)
    return [float(number) for numbers in found for number in numbers.split()]


def test_every_example_steers_as_much_as_the_table_shows_to_be_good():
    found = {str(path): shown(path.read_text()) for path in DOCUMENTS}
    assert len(found["docs/activation.md"]) == 5 and all(
        len(found[f"hf_value_steer/{file}"]) == 1 for file in ("cards/vectors.md", "activation/steering_vectors.py")
    )
    ratios = measured()
    assert max(ratios.values()) > 70 and all(ratios[m] <= 1.1 for numbers in found.values() for m in numbers)


def test_the_default_sweep_and_what_apply_shows_lie_where_vectors_work():
    ratios = measured()
    for sign in (-1, 1):
        within = [m for m in MULTIPLIERS if 0 < sign * m < 1]
        assert len(within) >= 2 and set(within) <= ratios.keys()
    required = {"output": "o", "model": "m", "vectors": "v", "prompts": "p", "judges": ["j"]}
    assert SweepArguments(**required).multipliers == list(MULTIPLIERS)
    assert all(ratios[m] < 2 for m in ApplyArguments(model="m", vectors="v", prompts="p").multipliers)
