"""`generate(..., value_steer=ActivationConfig(...))`: alone, beside filter and abstention, gated by a value head."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    ValueSteerForCausalLM,
    enable_value_steer,
    value_steer_generate,
)
from hf_value_steer.activation.apply import is_steered
from hf_value_steer.backbone.features import collected
from hf_value_steer.configuration.parse import parse_value_steer
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.scorer import layers_read
from hf_value_steer.hosts.transformers import CACHE
from tests.families import build, layered_head, random_head
from tests.oracle import states
from tests.parity.test_activation import IDS, MASK, reference
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


GREEDY = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
KERNELS = ["masked", "expanded", "shared_prefix"]


@pytest.fixture(scope="module")
def model():
    return enable_value_steer(build("llama"))


@pytest.fixture(scope="module")
def vectors(model):
    return random_vectors(model).scale(model, SEQUENCES)


@pytest.fixture(scope="module")
def baked(model, vectors, tmp_path_factory):
    """The oracle: the same steering in the weights of another model."""
    folder = tmp_path_factory.mktemp("baked") / "llama"
    vectors.bake(model, 4.0, folder)
    return enable_value_steer(AutoModelForCausalLM.from_pretrained(folder).eval())


class Streamer(list):
    def put(self, tokens):
        self.append(tokens.tolist())

    def end(self):
        self.append("end")


@pytest.mark.parametrize("options", [{}, {"tokens": "generated"}, {"mode": "last_token"}, {"multiplier": [4.0, -4.0]}])
@pytest.mark.parametrize("cache", [None, "static"])
def test_alone_it_is_plain_generate_with_vectors_applied(model, vectors, options, cache):
    options = {"multiplier": 4.0, **options}
    sampling = {"attention_mask": MASK, "do_sample": True, "max_new_tokens": 12, "cache_implementation": cache}
    with vectors.apply(model, **options):
        torch.manual_seed(0)
        expected = model.generate(IDS, **sampling)
    config, streamer = ActivationConfig(vectors=vectors, **options), Streamer()
    torch.manual_seed(0)
    assert torch.equal(model.generate(IDS, value_steer=config, **sampling), expected)
    torch.manual_seed(0)
    found = model.generate(IDS, custom_generate=value_steer_generate, value_steer=config, **sampling)
    assert torch.equal(found, expected)
    model.generate(IDS[:1], value_steer=ActivationConfig(vectors=vectors), streamer=streamer, max_new_tokens=3)
    assert len(streamer) == 5 and streamer[-1] == "end"
    assert not is_steered(model)


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("lookahead", KERNELS)
@pytest.mark.parametrize("sample", [False, True])
def test_filter_over_vectors_is_filter_over_the_baked_model(model, vectors, baked, evaluation, lookahead, sample):
    head = random_head(model)
    choices = {"num_candidates": 4, "evaluation": evaluation, "lookahead": lookahead, "seed": 3}
    steer = ValueFilterConfig(value_head=head, **choices)
    options = {**GREEDY, "do_sample": sample}
    torch.manual_seed(1)
    expected = baked.generate(IDS, value_steer=steer, **options)
    torch.manual_seed(1)
    found = model.generate(IDS, value_steer=[steer, ActivationConfig(vectors=vectors, multiplier=4.0)], **options)
    assert expected.interventions.any()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.token_values, expected.token_values, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("layers", [[0], [1], [0, "final"]], ids=str)
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_vectors_are_added_before_a_head_reads_the_same_layer(model, vectors, evaluation, layers, temporal):
    """Its values are those of a forward of the text with the vectors added by hand."""
    head = layered_head(model, layers, temporal)
    steer = ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4, evaluation=evaluation)
    found = model.generate(
        IDS, value_steer=[ActivationConfig(vectors=vectors, multiplier=2.0), steer], **{**GREEDY, "min_new_tokens": 12}
    )
    assert found.interventions.any()
    for row, mask in enumerate(MASK.bool()):
        ids = found.sequences[row, (~mask).sum() :]
        plain, added = read(model, ids, layers), read(model, ids, layers, vectors)
        assert (plain[0] - added[0]).abs().max() > 0.1
        values = head(added[mask.sum() - 1 :]).value
        torch.testing.assert_close(found.prompt_values[row], values[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.token_values[row], values[1:], rtol=0, atol=1e-4)


@torch.no_grad()
def read(model, ids, layers, vectors=None):
    """What a head on `layers` reads of each token, with vectors that are added by hand."""
    hooks = [] if vectors is None else reference(model, vectors, 2.0)
    feature = states(model, ids.tolist(), layers)
    for hook in hooks:
        hook.remove()
    return feature


@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("method", ["filter", "abstain"])
@pytest.mark.parametrize("made", ["before", "inside"])
def test_a_processor_reads_a_layer_after_its_vectors(model, vectors, made, method, temporal):
    """Whether it was made before the vectors were put on, or inside the block."""
    head = layered_head(model, [0], temporal)
    config = {"value_head": head, "threshold": 0.5}
    if method == "filter":
        steer = ValueFilterConfig(**config, num_candidates=4, proposal="topk")
        make = partial(ValueFilterLogitsProcessor, model, steer)
    else:
        steer = AbstentionConfig(**config, patience=3)
        make = partial(AbstentionLogitsProcessor, model, steer)
    activate = ActivationConfig(vectors=vectors, multiplier=2.0)
    expected, without = (model.generate(IDS, value_steer=each, **GREEDY) for each in ([activate, steer], activate))
    assert not torch.equal(expected.sequences, without.sequences)
    processor = make() if made == "before" else None
    with vectors.apply(model, 2.0):
        found = model.generate(IDS, logits_processor=[processor or make()], **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_processor_beside_vectors_of_the_call(model, vectors):
    """Abstention reads what the call's forwards have left; the filter would look ahead without the vectors."""
    head, activate = layered_head(model, [0]), ActivationConfig(vectors=vectors, multiplier=2.0)
    abstain = AbstentionConfig(value_head=head, threshold=0.5, patience=3)
    expected = model.generate(IDS, value_steer=[activate, abstain], **GREEDY)
    processor = AbstentionLogitsProcessor(model, abstain)
    found = model.generate(IDS, value_steer=activate, logits_processor=[processor], **GREEDY)
    assert expected.abstained.any() and torch.equal(found.sequences, expected.sequences)
    processor = ValueFilterLogitsProcessor(model, ValueFilterConfig(value_head=random_head(model), threshold=0.5))
    with pytest.raises(UnsupportedError, match="do not reach the look-ahead of a ValueFilterLogitsProcessor"):
        model.generate(IDS, value_steer=activate, logits_processor=[processor], **GREEDY)
    model.generate(IDS, value_steer=abstain, logits_processor=[processor], **GREEDY)


def test_abstention_over_vectors_is_abstention_over_the_baked_model(model, vectors, baked):
    steer = AbstentionConfig(value_head=random_head(model), threshold=0.5)
    expected = baked.generate(IDS, value_steer=steer, **GREEDY)
    found = model.generate(IDS, value_steer=[ActivationConfig(vectors=vectors, multiplier=4.0), steer], **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.abstention_step, expected.abstention_step) and expected.abstained.any()


@torch.no_grad()
def gated(model, vectors, head, ids, multiplier):
    """The slowest correct gate: one row, one forward a token, vectors put on and taken off again for each."""
    cache, token, needed, tokens, opened, memory = None, ids, False, [], [], head.memory(1)
    layers = layers_read(head, model)
    for _ in range(12):
        with vectors.apply(model, multiplier if needed else 0.0), collected(model, layers) as seen:
            outputs = model(token, **{CACHE: cache})
        cache, read_now = outputs[CACHE], head(seen[0].of(layers)[:, -1:], memory=memory)
        needed, memory = bool(read_now.value >= head.config.threshold), read_now.memory
        token = outputs.logits[:, -1:].argmax(-1)
        tokens.append(token.item())
        opened.append(needed)
    return tokens, opened


@pytest.mark.parametrize("head", [None, ([0], "none"), ([0], "ema"), ([1, "final"], "mean")], ids=str)
@pytest.mark.parametrize("mode", ["broadcast", "last_token"])
def test_a_gate_steers_only_while_the_value_is_not_acceptable(model, vectors, mode, head):
    head = layered_head(model, *head) if head else random_head(model, "undesirable", "linear")
    config = ActivationConfig(vectors=vectors, multiplier=3.0, value_head=head, mode=mode)
    found, opened = model.generate(IDS, value_steer=config, **{**GREEDY, "min_new_tokens": 12}), []
    for row in range(2):
        ids = IDS[row, MASK[row].bool()][None]
        model.generation_config.eos_token_id, eos = None, model.generation_config.eos_token_id
        alone = model.generate(ids, value_steer=config, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        model.generation_config.eos_token_id = eos
        tokens, open_at = gated(model, vectors, head, ids, 3.0)
        assert alone == tokens
        opened += open_at
    assert any(opened) and not all(opened)
    assert found.token_values.shape == (2, 12) and not found.interventions.any()


def test_every_kernel_gates_alike(model, vectors):
    head, other = random_head(model), random_head(model, "desirable", "linear")
    gate = ActivationConfig(vectors=vectors, multiplier=[6.0, -6.0], value_head=other)
    texts = []
    for lookahead in KERNELS:
        for evaluation in ("lazy", "eager"):
            steer = ValueFilterConfig(value_head=head, num_candidates=4, lookahead=lookahead, evaluation=evaluation)
            texts.append(model.generate(IDS, value_steer=[steer, gate], **GREEDY))
    assert all(torch.equal(text.sequences, texts[0].sequences) for text in texts)
    assert texts[0].interventions.any()
    for row in range(2):
        steer = ValueFilterConfig(value_head=head, num_candidates=4)
        one = ActivationConfig(vectors=vectors, multiplier=gate.multiplier[row], value_head=other)
        ids = IDS[row, MASK[row].bool()][None]
        alone = model.generate(ids, value_steer=[steer, one], do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert texts[0].sequences[row, 6 : 6 + len(alone)].tolist() == alone.tolist()


def test_a_head_that_fails_stops_the_text_and_leaves_the_model_alone(model, vectors):
    head = random_head(model)
    with torch.no_grad():
        head.net[-1].bias.fill_(torch.inf)
        before = model(IDS).logits
    config = ActivationConfig(vectors=vectors, value_head=head, threshold=0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.generate(IDS, value_steer=config, **GREEDY)
    assert not is_steered(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_json_and_defaults(model, vectors, tmp_path):
    vectors.save_pretrained(tmp_path)
    config = ActivationConfig(vectors=str(tmp_path), multiplier=[4.0, -4.0], mode="last_token")
    document = config.to_dict()
    assert document == {
        "method": "activate",
        "vectors": str(tmp_path),
        "multiplier": (4.0, -4.0),
        "mode": "last_token",
    }
    assert parse_value_steer(document)["activate"] == config
    texts = [model.generate(IDS, value_steer=each, **GREEDY).sequences for each in (config, document)]
    assert torch.equal(*texts)
    with pytest.raises(ValueError, match="no name"):
        ActivationConfig(vectors=vectors).to_dict()


def test_the_wrappers_head_gates_nothing(model, vectors):
    wrapper = ValueSteerForCausalLM(model, random_head(model))
    steer = [ActivationConfig(vectors=vectors, multiplier=4.0)]
    with vectors.apply(model, 4.0):
        expected = model.generate(IDS, **GREEDY).sequences
    found = wrapper.generate(IDS, value_steer=steer, **GREEDY)
    assert torch.equal(getattr(found, "sequences", found), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"multiplier": float("inf")}, ValueError, "`multiplier`"),
        ({"mode": "first"}, ValueError, "`mode`"),
        ({"threshold": 0.5}, ValueError, "pass `value_head`"),
        ({"min_new_tokens": 3}, ValueError, "pass `value_head`"),
        ({"value_head": "org/head", "tokens": "prompt"}, ValueError, "exclude each other"),
        ({"vectors": 3}, TypeError, "`vectors`"),
    ],
)
def test_bad_configurations(vectors, options, error, message):
    with pytest.raises(error, match=message):
        ActivationConfig(**{"vectors": vectors, **options})


def test_bad_calls(model, vectors):
    with pytest.raises(ValueError, match="has 3 entries"):
        model.generate(IDS, value_steer=ActivationConfig(vectors=vectors, multiplier=[1.0, 2.0, 3.0]), **GREEDY)
    with pytest.raises(ValueError, match="num_beams=3"):
        model.generate(IDS, value_steer=ActivationConfig(vectors=vectors), num_beams=3, **GREEDY)
    assert not is_steered(model)
