"""Vectors of steering-vectors and repeng, taken over: the same logits as those libraries get on the same model."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_value_steer.activation.interop import (
    vectors_from_file,
    vectors_from_repeng,
    vectors_from_steering_vectors,
)
from tests.families import build
from tests.golden_vectors import COEFFICIENT, FOLDER, IDS, by_repeng, by_steering_vectors, raw_vectors


GOLDEN = load_file(FOLDER / "imported_logits.safetensors")


@torch.no_grad()
def logits(vectors):
    model = build("llama", "eager")
    with vectors.apply(model, COEFFICIENT):
        return model(IDS).logits


def test_steering_vectors():
    vector = SimpleNamespace(layer_activations=raw_vectors(), layer_type="decoder_block")
    torch.testing.assert_close(logits(vectors_from_steering_vectors(vector)), GOLDEN["steering_vectors"])
    vector.layer_type = "mlp"
    with pytest.raises(ValueError, match="decoder_block"):
        vectors_from_steering_vectors(vector)


def test_repeng():
    directions = {layer: tensor.numpy() for layer, tensor in raw_vectors().items()}
    vector = SimpleNamespace(directions=directions, model_type="llama")
    torch.testing.assert_close(logits(vectors_from_repeng(vector)), GOLDEN["repeng"])


def test_repeng_gguf():
    vectors = vectors_from_file(FOLDER / "repeng.gguf", attribute="golden")
    torch.testing.assert_close(logits(vectors), GOLDEN["repeng"])
    assert (vectors.attribute, vectors.provenance) == ("golden", {"source": "gguf"})


def test_plain_tensors(tmp_path):
    save_file({f"direction.{layer}": tensor for layer, tensor in raw_vectors().items()}, tmp_path / "v.safetensors")
    torch.testing.assert_close(logits(vectors_from_file(tmp_path / "v.safetensors")), GOLDEN["repeng"])
    save_file({"other": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"direction\.LAYER"):
        vectors_from_file(tmp_path / "w.safetensors")


def test_the_packages_themselves():
    torch.testing.assert_close(by_steering_vectors(), GOLDEN["steering_vectors"])
    torch.testing.assert_close(by_repeng(), GOLDEN["repeng"])
