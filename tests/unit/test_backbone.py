"""What is read off a backbone: its decoder layers, whatever its config counts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, MarianConfig, MBartConfig, WhisperConfig

from hf_value_steer import enable_value_steer
from hf_value_steer.activation import SteeringVectors
from hf_value_steer.backbone.features import Features
from hf_value_steer.backbone.parts import decoder_layers, num_layers
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.errors import ScoringError
from tests.families import VOCABULARY, prompts


SIZES = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_encoder_decoder": False,
    "is_decoder": True,
}


@pytest.mark.parametrize("halves", [(6, 2), (3, 2), (2, 2)])
@pytest.mark.parametrize("config", [BartConfig, MBartConfig, MarianConfig, WhisperConfig])
def test_halves_of_different_depth(config, halves):
    encoder, decoder = halves
    sizes = {**SIZES, "encoder_layers": encoder, "decoder_layers": decoder}
    sizes |= {"begin_suppress_tokens": None, "suppress_tokens": None} if config is WhisperConfig else {}
    model = AutoModelForCausalLM.from_config(config(**sizes)).eval()
    assert num_layers(model) == len(decoder_layers(model)) == decoder
    vectors = SteeringVectors.from_tensors({decoder - 1: model.get_output_embeddings().weight[5].detach()})
    enable_value_steer(model)
    call = {**prompts(2), "do_sample": False, "max_new_tokens": 4}
    plain = model.generate(**call)
    steered = model.generate(**call, value_steer=ActivationConfig(vectors=vectors, multiplier=1e4))
    assert not torch.equal(steered, plain)


def test_a_layer_that_was_not_shown_is_an_error():
    features = Features({0: torch.zeros(1, 2, 4), "final": torch.ones(1, 2, 3)})
    assert features.of([0, "final"]).shape == (1, 2, 7) and features.of(["final"]).shape == (1, 2, 3)
    for layers in ([1], [0, 1]):
        with pytest.raises(ScoringError, match=r"did not call the layers \[1\]"):
            features.of(layers)
