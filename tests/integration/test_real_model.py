"""SmolLM2-135M-Instruct, its shipped head, and real text."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, set_seed

from hf_value_steer import AbstentionConfig, ValueFilterConfig, ValueHead, enable_value_steer
from tests.families import accepting_head


PROMPTS = ["The capital of France is", "Once upon a time there was a dragon who", "My favourite food is"]
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def head():
    return ValueHead.from_pretrained("model_cards/smollm2-135m-toxicity-final")


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_identity(smollm2, tokenizer, evaluation):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    config = ValueFilterConfig(value_head=accepting_head(smollm2), evaluation=evaluation, num_candidates=4)
    set_seed(0)
    plain = smollm2.generate(**inputs, **SAMPLING)
    set_seed(0)
    assert torch.equal(enable_value_steer(smollm2).generate(**inputs, **SAMPLING, value_steer=config), plain)


def test_the_shipped_head_belongs_to_this_backbone_and_works_alike_lazy_and_eager(smollm2, tokenizer, head):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    outputs = []
    for evaluation in ("lazy", "eager"):
        set_seed(1)
        config = ValueFilterConfig(value_head=head, threshold=0.01, evaluation=evaluation)
        out = enable_value_steer(smollm2).generate(
            **inputs, **SAMPLING, value_steer=config, return_dict_in_generate=True
        )
        outputs.append(out)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences) and outputs[0].interventions.any()
    torch.testing.assert_close(outputs[0].token_values, outputs[1].token_values, rtol=0, atol=1e-4, equal_nan=True)


def test_a_detected_word_is_valued_high(smollm2, tokenizer, head):
    texts = ["He looked at me and said, you are a damn idiot", "He looked at me and said, you are a kind friend"]
    values = [
        head(smollm2.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state).value for text in texts
    ]
    assert values[0][0, -2:].max() > head.config.threshold > values[1][0, -2:].max()


def test_text_streamer_and_stop_strings(smollm2, tokenizer, head):
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {
        **inputs, "do_sample": False, "max_new_tokens": 24, "value_steer": ValueFilterConfig(value_head=head),
        "stop_strings": ["."], "tokenizer": tokenizer,
    }  # fmt: skip
    thread = threading.Thread(target=enable_value_steer(smollm2).generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    out = smollm2.generate(**arguments)[0, inputs["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(out) and streamed.endswith(".")


def test_abstention_appends_its_message(smollm2, tokenizer, head):
    message = tokenizer(" [stopped]")["input_ids"]
    config = AbstentionConfig(value_head=head, threshold=0.001, message_ids=message)
    inputs = tokenizer(PROMPTS[2], return_tensors="pt")
    out = enable_value_steer(smollm2).generate(
        **inputs, do_sample=False, max_new_tokens=40, value_steer=config, return_dict_in_generate=True
    )
    assert out.abstained.item()
    text = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    assert text.endswith(" [stopped]")
