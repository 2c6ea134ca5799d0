"""Steering by vectors: what is added where, in every way a model is run; and nothing of it is left behind."""

import contextvars
import gc
import threading

import pytest
import torch

from hf_value_steer.activation import SteeringVectors
from hf_value_steer.activation.apply import is_steered
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, build
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


IDS = torch.tensor([[5, 17, 3, 44, 71, 8], [0, 0, 9, 10, 60, 33]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def reference(model, vectors, multiplier):
    """The slowest correct implementation: edit the residual by hooks and forward all of the text."""
    hooks = []
    for layer, strength, direction in zip(vectors.layers, vectors.strengths, vectors.directions, strict=True):
        offset = multiplier * strength * direction

        def add(_module, _args, output, offset=offset):
            return (output[0] + offset, *output[1:]) if isinstance(output, tuple) else output + offset

        hooks.append(model.model.layers[layer].register_forward_hook(add))
    return hooks


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def steerable(llama):
    return llama, random_vectors(llama).scale(llama, SEQUENCES)


@torch.no_grad()
def test_broadcast_is_the_reference(steerable):
    model, vectors = steerable
    hooks = reference(model, vectors, 3.0)
    expected = model(IDS[:1]).logits
    texts = model.generate(IDS[:1], **GREEDY)
    for hook in hooks:
        hook.remove()
    with vectors.apply(model, 3.0):
        torch.testing.assert_close(model(IDS[:1]).logits, expected)
        assert torch.equal(model.generate(IDS[:1], **GREEDY), texts)
    assert not torch.equal(model.generate(IDS[:1], **GREEDY), texts)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_multiplier_for_each_row_equals_rows_alone(family):
    model = build(family)
    vectors = random_vectors(model).scale(model, SEQUENCES)
    options = {**GREEDY, "attention_mask": MASK, "pad_token_id": 0}
    with vectors.apply(model, [4.0, -4.0]):
        together = model.generate(IDS, **options)
    for row, multiplier in enumerate([4.0, -4.0]):
        with vectors.apply(model, multiplier):
            alone = model.generate(IDS[row, MASK[row].bool()][None], **GREEDY)
        new = together[row, IDS.shape[1] :].tolist()
        assert new[: alone.shape[1] - int(MASK[row].sum())] == alone[0, int(MASK[row].sum()) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_last_token_changes_the_last_position_only(steerable, padding):
    model, vectors = steerable
    vectors = vectors.only([1])
    ids, mask = (IDS, MASK) if padding == "left" else (IDS.flip(1), MASK.flip(1))
    states = {"output_hidden_states": True, "attention_mask": mask}
    plain = model.model.layers[1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    kept: list[torch.Tensor] = []
    model(ids, attention_mask=mask)
    with vectors.apply(model, 1.0, mode="last_token"):
        model(ids, **states)
        plain.remove()
        changed = model(ids, **states).hidden_states
    moved = (changed[2] - model(ids, **states).hidden_states[2]).norm(dim=-1) > 1e-6
    last = [5, 5] if padding == "left" else [5, 3]
    assert moved.nonzero().tolist() == [[0, last[0]], [1, last[1]]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "prompt", "generated"),
    [
        ({"tokens": "prompt"}, "all", False),
        ({"tokens": "generated"}, "none", True),
        ({"mode": "last_token"}, "last", True),
        ({"mode": "last_token", "tokens": "prompt"}, "last", False),
    ],
)
def test_which_tokens_are_steered_while_generating(steerable, options, prompt, generated):
    model, vectors = steerable
    plain, changed = [], []
    for record, multiplier in ((plain, 0.0), (changed, 5.0)):
        with vectors.only([0]).apply(model, multiplier, **options):
            hook = model.model.layers[0].register_forward_hook(lambda _m, _a, out, into=record: into.append(out))
            out = model.generate(IDS, attention_mask=MASK, forced_eos_token_id=None, **GREEDY)
            hook.remove()
    first = (changed[0] - plain[0]).norm(dim=-1) > 1e-6
    expected = {"all": torch.ones_like(first), "none": torch.zeros_like(first)}
    expected["last"] = torch.zeros_like(first)
    expected["last"][:, -1] = True
    assert torch.equal(first, expected[prompt])
    assert out.shape[1] > IDS.shape[1] + 1
    # The second forward reads the same token only if the first one was not changed.
    if prompt == "none":
        second = (changed[1] - plain[1]).norm(dim=-1)
        assert torch.allclose(second, torch.full_like(second, 5.0 * vectors.strengths[0].item()), rtol=1e-4)
    assert generated or prompt != "none"


@torch.no_grad()
def test_beams_and_samples_and_static_caches(steerable):
    model, vectors = steerable
    ids = IDS[:1]
    with vectors.apply(model, 4.0):
        beams = model.generate(ids, num_beams=3, **GREEDY)
        dynamic, static = (model.generate(ids, cache_implementation=kind, **GREEDY) for kind in (None, "static"))
        torch.manual_seed(0)
        samples = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert torch.equal(dynamic, static)
    assert not torch.equal(beams, model.generate(ids, num_beams=3, **GREEDY))
    with vectors.apply(model, [4.0, 4.0, 4.0]):
        torch.manual_seed(0)
        assert torch.equal(samples, model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5))


@torch.no_grad()
def test_a_graph_that_was_compiled_before_is_steered(llama):
    vectors = random_vectors(llama).scale(llama, SEQUENCES)
    compiled = torch.compile(llama.__call__, backend="eager", fullgraph=True)
    before = compiled(IDS[:1]).logits
    for multiplier in (1.0, [2.0]):
        with vectors.apply(llama, multiplier):
            torch.testing.assert_close(compiled(IDS[:1]).logits, llama(IDS[:1]).logits)
            assert not torch.allclose(compiled(IDS[:1]).logits, before)
    with vectors.apply(llama, mode="last_token"), pytest.raises(Exception, match="Compiled models"):
        compiled(IDS[:1])
    assert torch.equal(compiled(IDS[:1]).logits, before)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.usefixtures("fresh_graphs")
@torch.no_grad()
def test_a_graph_that_another_thread_runs_is_not_steered(llama):
    vectors = random_vectors(llama).scale(llama, SEQUENCES)
    compiled = torch.compile(llama.__call__, backend="eager", fullgraph=True)
    plain = llama(IDS[:1]).logits
    with vectors.apply(llama, 2.0):
        expected = llama(IDS[:1]).logits
        for _ in range(2):
            torch.testing.assert_close(compiled(IDS[:1]).logits, expected)
            assert torch.equal(in_a_thread(torch.no_grad()(lambda: compiled(IDS[:1]).logits)), plain)
    assert not torch.equal(expected, plain)


@torch.no_grad()
def test_a_block_in_which_only_another_thread_generated_raises(steerable):
    model, vectors = steerable
    with pytest.raises(RuntimeError, match="what that wrote is not steered"), vectors.apply(model):
        in_a_thread(lambda: model.generate(IDS, **GREEDY))
    with vectors.apply(model):
        context = contextvars.copy_context()
        steered = in_a_thread(lambda: context.run(model.generate, IDS, **GREEDY))
        assert torch.equal(steered, model.generate(IDS, **GREEDY))


@torch.no_grad()
def test_a_generator_whose_steps_other_threads_run_raises(steerable):
    """Its block is entered in one thread; what the others run is not steered."""
    model, vectors = steerable

    def pieces():
        with vectors.apply(model, 4.0):
            for _ in range(3):
                yield model.generate(IDS, **GREEDY)

    generator = pieces()
    steered = next(generator)
    assert not torch.equal(in_a_thread(lambda: next(generator)), steered)
    next(generator)
    assert "is not steered" in str(in_a_thread(lambda: raised(lambda: next(generator))))


def raised(function):
    try:
        return function()
    except Exception as error:
        return error


@torch.no_grad()
def test_three_hundred_cycles_leave_nothing(steerable):
    model, vectors = steerable
    before, attributes = model(IDS).logits, {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    with vectors.apply(model):
        model(IDS)
    gc.collect()
    objects = len(gc.get_objects())
    for cycle in range(300):
        with vectors.apply(model, [1.0, -1.0] if cycle % 2 else 2.0, mode="last_token" if cycle % 3 else "broadcast"):
            if cycle % 50 == 0:
                model(IDS)
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert torch.equal(model(IDS).logits, before)
    assert [type(module) for module in model.modules()] == classes
    assert {name: dict(vars(module)).keys() for name, module in model.named_modules()} == {
        name: keys.keys() for name, keys in attributes.items()
    }


@torch.no_grad()
def test_removed_after_an_exception(steerable):
    model, vectors = steerable
    before = model(IDS).logits
    with pytest.raises(KeyboardInterrupt), vectors.apply(model):
        raise KeyboardInterrupt
    assert not is_steered(model) and torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_layers_with_a_forward_of_their_own(steerable):
    """`accelerate` puts one on each layer of a dispatched model."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, vectors = steerable
    with vectors.apply(model):
        expected = model(IDS).logits
    plain = model(IDS).logits
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    own = [vars(layer)["forward"] for layer in model.model.layers]
    with vectors.apply(model):
        assert torch.equal(model(IDS).logits, expected)
    assert [vars(layer)["forward"] for layer in model.model.layers] == own
    assert torch.equal(model(IDS).logits, plain)
    for layer in model.model.layers:
        remove_hook_from_module(layer)


def refused(model, vectors, message, **options):
    before = model(IDS).logits
    with pytest.raises(ValueError, match=message), vectors.apply(model, **options):
        pass
    assert not is_steered(model) and torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_bad_input(steerable):
    model, vectors = steerable
    refused(model, SteeringVectors.from_tensors({0: torch.ones(16)}), "16 wide")
    refused(model, SteeringVectors.from_tensors({2: torch.ones(32)}), "layers 0 to 1")
    refused(model, SteeringVectors.from_tensors({0: torch.ones(32)}, num_layers=30), "30 layers")
    other = SteeringVectors.from_tensors({0: torch.ones(32)}, backbone="org/other", backbone_fingerprint="ab")
    refused(model, other, "org/other")
    refused(model, vectors, "`multiplier`", multiplier=float("nan"))
    refused(model, vectors, "`multiplier`", multiplier=[])
    refused(model, vectors, "`mode`", mode="everywhere")
    refused(model, vectors, "`tokens`", tokens="some")
    with other.apply(model, allow_backbone_mismatch=True):
        refused_inside = pytest.raises(ValueError, match="steered by vectors already")
        with refused_inside, vectors.apply(model):
            pass
        assert is_steered(model)
    with vectors.apply(model, [1.0, 2.0, 3.0]), pytest.raises(ValueError, match="one multiplier for each row"):
        model(IDS)


@torch.no_grad()
def test_tokens_that_cannot_be_told_apart_are_refused(steerable):
    model, vectors = steerable
    cache = model(IDS)[CACHE]
    with vectors.apply(model, tokens="generated"), pytest.raises(ValueError, match="cannot be told"):
        model(IDS[:, :2], **{CACHE: cache})
