from collections import Counter

import pytest
import torch

from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.forced_words import ForcedWords
from tests.tiny_text import BAD, GOOD, save_tiny_model


WORDS = [BAD[0], f"{BAD[1]} {GOOD[0]}", f"{GOOD[1]} {BAD[2]} {BAD[3]}"]  # of one, two and three pieces


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(save_tiny_model(tmp_path_factory.mktemp("model"))), "float32", torch.device("cpu"))


def test_the_rest_of_a_word_is_as_likely_as_the_model_says(backbone):
    model, tokenizer = backbone
    words = ForcedWords(model, tokenizer, WORDS)
    for ids, rest in zip(words.ids, words.rest, strict=True):
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(probabilities[at, ids[at + 1]].item() for at in range(len(ids) - 1))
        assert rest.item() == pytest.approx(expected, abs=1e-5)


def test_a_word_is_drawn_by_the_root_of_its_probability(backbone):
    model, tokenizer = backbone
    words = ForcedWords(model, tokenizer, WORDS)
    torch.manual_seed(0)
    logits = torch.randn(model.config.vocab_size)
    weights = ((logits.log_softmax(-1)[words.first] + words.rest) / 2).exp()
    expected, drawn = Counter(), Counter(tuple(words.draw(logits)) for _ in range(4000))
    for ids, weight in zip(words.ids, (weights / weights.sum()).tolist(), strict=True):
        expected[tuple(ids)] += weight
    assert all(drawn[ids] / 4000 == pytest.approx(share, abs=0.03) for ids, share in expected.items())


def test_forms_of_a_word(backbone):
    known = {" ab": [5], " Ab": [6, 7], " AB": [8], "ab": [9]}

    def tokenize(texts, add_special_tokens):
        return {"input_ids": [known[text] for text in texts]}

    assert ForcedWords(backbone[0], tokenize, ["ab"]).ids == list(known.values())


def test_no_word_is_an_error(backbone):
    with pytest.raises(ValueError, match="no word to force in"):
        ForcedWords(*backbone, [])
