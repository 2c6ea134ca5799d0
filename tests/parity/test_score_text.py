"""Values of texts that are there already: those of decode time, whatever the batch, the padding and the chunks."""

import copy
import math

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, score_text
from hf_value_steer.errors import MismatchError, ScoringError, UnsupportedError
from tests.families import FAMILIES, build, layered_head, prompts, random_head
from tests.steer import steer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of PEFT

NEW = 14
HEADS = [(layers, temporal) for layers in ([0], ["final"], [0, -1]) for temporal in ("none", "mean", "ema")]


@pytest.fixture(scope="module", params=FAMILIES)
def written(request):
    """A model, a head, and what was written by steering: prompts and texts as token ids, and the values of then."""
    model = build(request.param)
    return steered(model, random_head(model))


@pytest.fixture(scope="module", params=HEADS, ids=str)
def written_with_memory(request):
    """The same of a head on other layers, or over time."""
    model = build("gemma3")
    return steered(model, layered_head(model, *request.param))


def steered(model, head):
    given = prompts(3)
    config = ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=4)
    output = steer(model, config, **given, max_new_tokens=NEW, do_sample=True)
    length = given["input_ids"].shape[1]
    counts = (~output.token_values.isnan()).sum(dim=1).tolist()
    return (
        model,
        head,
        {
            "prompts": [row[mask.bool()].tolist() for row, mask in zip(*given.values(), strict=True)],
            "texts": [
                row[length : length + count].tolist() for row, count in zip(output.sequences, counts, strict=True)
            ],
            "values": [row[:count].tolist() for row, count in zip(output.token_values, counts, strict=True)],
            "prompt_values": output.prompt_values.tolist(),
        },
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_values_are_those_of_decode_time(written, batch_size):
    are_those_of_decode_time(*written, batch_size=batch_size)


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 3}, {"chunk": 1}, {"chunk": 4}], ids=str)
def test_values_of_heads_on_layers_and_over_time_are_those_of_decode_time(written_with_memory, how):
    are_those_of_decode_time(*written_with_memory, **how)


def are_those_of_decode_time(model, head, known, **how):
    found = list(score_text(model, head, known["texts"], known["prompts"], threshold=0.4, **how))
    assert [each.tokens for each in found] == known["texts"]
    for each, values, prompt_value in zip(found, known["values"], known["prompt_values"], strict=True):
        assert each.values == pytest.approx(values, abs=1e-4)
        assert each.prompt_value == pytest.approx(prompt_value, abs=1e-4)
        assert len(set(values)) > 1
        bad = [place for place, value in enumerate(each.values) if value >= 0.4]
        assert each.first_unacceptable == (bad[0] if bad else None)


@pytest.mark.parametrize("chunk", [1, 5])
def test_long_texts_are_read_in_parts(written, chunk):
    model, head, known = written
    whole = list(score_text(model, head, known["texts"], known["prompts"], threshold=0.4))
    parts = score_text(model, head, known["texts"], known["prompts"], threshold=0.4, chunk=chunk)
    if model._is_stateful:
        with pytest.raises(UnsupportedError, match="recurrent state"):
            next(parts)
        return
    for one, other in zip(whole, parts, strict=True):
        assert other.values == pytest.approx(one.values, abs=1e-4)


def test_texts_and_token_ids_are_the_same(smollm2, tokenizer):
    head = random_head(smollm2)
    texts, prompts = ["a dog barked.", "it rained", ""], ["Last night", "In the morning", "At noon"]
    given = {"tokenizer": tokenizer, "threshold": 0.5}
    found = list(score_text(smollm2, head, texts, prompts, **given))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    known = list(score_text(smollm2, head, ids, [tokenizer(each)["input_ids"] for each in prompts], threshold=0.5))
    assert found == known and [each.tokens for each in found] == ids and found[2].values == []
    alone = list(score_text(smollm2, head, ["Last nighta dog barked."], **given))
    assert alone[0].prompt_value is None and len(alone[0].values) == len(
        tokenizer("Last nighta dog barked.")["input_ids"]
    )


def test_texts_are_read_as_they_are_asked_for():
    model = build("llama")
    asked = []

    def texts():
        for number in range(1000):
            asked.append(number)
            yield [5, 6, 7]

    found = score_text(model, random_head(model), texts(), threshold=0.5, batch_size=4)
    next(found)
    assert len(asked) == 4


def test_no_position_reaches_the_output_embedding():
    model = build("llama")
    positions = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, _types, args=(), kwargs=None):
            if function is torch.nn.functional.linear and args[1] is model.lm_head.weight:
                positions.append(args[0].shape[1])
            return function(*args, **(kwargs or {}))

    with Watch():
        list(score_text(model, random_head(model), [[5, 6, 7]] * 3, threshold=0.5))
        assert positions == [0]
        model(torch.tensor([[5, 6, 7]]))
    assert positions == [0, 3]


def test_what_cannot_be_done_is_refused():
    model = build("llama")
    head = random_head(model)
    with pytest.raises(ValueError, match="Text 2 is 129 tokens long with its prompt; this model reads 128"):
        list(score_text(build("gpt2"), head, [[5], [6], [7] * 129], threshold=0.5, batch_size=2))
    for wrong in ({"batch_size": 0}, {"chunk": 0}, {"threshold": (0.5, 0.6)}):
        with pytest.raises(ValueError, match="at least 1|one number"):
            score_text(model, head, [[5]], **{"threshold": 0.5, **wrong})
    with pytest.raises(ValueError, match="one text after the other"):
        score_text(model, head, "a text", threshold=0.5)
    with pytest.raises(ValueError, match="`tokenizer` is needed"):
        list(score_text(model, head, ["a text"], threshold=0.5))
    with pytest.raises(ValueError, match="shorter|longer"):
        list(score_text(model, head, [[5], [6]], [[7]], threshold=0.5))
    wide = ValueHead(ValueHeadConfig(hidden_size=64, threshold=0.5))
    with pytest.raises(MismatchError, match="hidden_size=64"):
        score_text(model, wide, [[5]])
    head.net[-1].bias.data.fill_(torch.nan)
    with pytest.raises((ScoringError, ValueError), match="finite|no number"):
        list(score_text(model, head, [[5, 6]], threshold=0.5))


def test_the_first_token_of_a_text_without_a_prompt_has_no_value():
    """No head has learned from one, and a mean would never forget its state, which is like no other."""
    model, text = build("llama"), [5, 9, 33, 7, 12, 40]
    for temporal in ("none", "mean", "ema"):
        head = layered_head(model, [0], temporal)
        (alone,) = score_text(model, head, [text], threshold=0.5)
        (behind,) = score_text(model, head, [text[2:]], [text[:2]], threshold=0.5)
        assert math.isnan(alone.values[0]) and alone.values[1:] == [
            pytest.approx(value, abs=1e-5) for value in [behind.prompt_value, *behind.values]
        ]
        bad = [place for place, value in enumerate(alone.values) if value >= 0.5]
        assert alone.first_unacceptable == (bad[0] if bad else None)
    (single,) = score_text(model, head, [[5]], threshold=0.5)
    assert math.isnan(single.values[0]) and single.first_unacceptable is None


def test_an_adapter_that_is_merged_and_off_is_not_damaged():
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama"), lora).eval()
    head, text = layered_head(build("llama"), [0]), [5, 9, 33, 7, 12]
    before = model(torch.tensor([text])).logits
    model.merge_adapter()
    with model.disable_adapter():
        found = [next(score_text(model, head, [text], threshold=0.5)).values[1:] for _ in range(2)]
        expected = next(score_text(build("llama"), head, [text], threshold=0.5)).values[1:]
    assert found[0] == found[1] == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(model(torch.tensor([text])).logits, before, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_are_refused():
    tuned = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        score_text(tuned, random_head(build("llama")), [[5, 9, 33]])


def test_an_offloaded_model_has_the_same_values():
    model, text = build("llama"), [5, 9, 33, 7, 12]
    head = layered_head(model, [0])
    (expected,) = score_text(model, head, [text], threshold=0.5)
    (found,) = score_text(cpu_offload(model, execution_device="cpu"), head, [text], threshold=0.5)
    assert found.values[1:] == pytest.approx(expected.values[1:], abs=1e-6)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_longer_text_beside_it_changes_nothing(kind):
    config = copy.deepcopy(FAMILIES["llama"])
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
        config.rope_parameters |= factors
        config.original_max_position_embeddings = 16
    config.max_position_embeddings = 64 if kind == "longrope" else 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    config.max_position_embeddings = 64
    head, short, long = random_head(model), [5, 9, 33, 7, 12], list(range(3, 33))
    (alone,) = score_text(model, head, [short], threshold=0.5)
    beside, _ = score_text(model, head, [short, long], threshold=0.5)
    assert beside.values[1:] == pytest.approx(alone.values[1:], abs=1e-6)


@pytest.mark.parametrize("text", [[5.7, 1], b"abc", [{"role": "user", "content": "hi"}], [5, 101], [-1]], ids=str)
def test_what_is_no_text_is_said(text):
    model = build("llama")
    with pytest.raises(ValueError, match="sequence of token ids below 101"):
        list(score_text(model, random_head(model), [text], threshold=0.5))
