"""`generate(value_steer=...)`: every place where an argument may stand, and every end that a call may have."""

import asyncio
import copy
import io
import logging
import pickle
import threading
from functools import partial

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    TextIteratorStreamer,
)

from hf_value_steer import (
    ScoringError,
    UnsupportedError,
    ValueFilterConfig,
    ValueSteerForCausalLM,
    disable_value_steer,
    enable_value_steer,
    value_steer_generate,
)
from tests.families import accepting_head, build, prompts, random_head
from tests.steer import GREEDY, rejecting
from tests.tiny_text import save_tiny_model


@pytest.fixture
def model():
    return enable_value_steer(build("llama"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tokenizer")))


rejecting = partial(rejecting, seed=1)


def steered(model, *args, **arguments):
    return model.generate(*args, **{**prompts(2), **GREEDY, **arguments})


# A5: transformers branches away before our strategy.


@pytest.mark.parametrize("place", ["argument", "config", "default"])
def test_paged_caches_are_refused(model, place):
    paged = {"cache_implementation": "paged"}
    call = {"argument": paged, "config": {"generation_config": GenerationConfig(**paged, **GREEDY)}, "default": {}}[
        place
    ]
    if place == "default":
        model.generation_config.cache_implementation = "paged"
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model.generate(**prompts(2), **call, value_steer=rejecting(model))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
@pytest.mark.parametrize("place", ["argument", "config", "default"])
def test_continuous_batching_is_refused(model, name, place):
    config = rejecting(model)
    call = {"argument": {"value_steer": config}, "default": {}}.get(place)
    if place == "config":
        call = {"generation_config": GenerationConfig(value_steer=config)}
    if place == "default":
        model.generation_config.value_steer = config
    with pytest.raises(UnsupportedError, match=f"`{name}` cannot be steered"):
        getattr(model, name)(*([[[3, 4]]] if name == "generate_batch" else []), **call)


# A6: our argument in a generation config.


@pytest.mark.parametrize("form", ["config", "dict", "list"])
@pytest.mark.parametrize("place", ["argument", "positional", "default", "default under a callable"])
def test_a_generation_config_steers_like_the_argument(model, form, place, tmp_path):
    config = rejecting(model)
    expected = steered(model, value_steer=config)
    assert not torch.equal(expected, steered(model))
    if form == "dict":
        config.value_head.save_pretrained(tmp_path)
        config = {**vars(config), "method": "filter", "value_head": str(tmp_path)}
    config = [config] if form == "list" else config
    mine = GenerationConfig(**GREEDY, value_steer=config, eos_token_id=2, pad_token_id=0)
    if place == "argument":
        found = model.generate(**prompts(2), generation_config=mine)
    elif place == "positional":
        inputs = prompts(2)
        found = model.generate(inputs["input_ids"], mine, attention_mask=inputs["attention_mask"])
    else:
        model.generation_config.value_steer = config
        callable_ = {"custom_generate": value_steer_generate} if "callable" in place else {}
        found = steered(model, **callable_)
    assert torch.equal(found, expected)


def test_the_argument_goes_before_the_generation_config(model):
    model.generation_config.value_steer = rejecting(model)
    accept = ValueFilterConfig(value_head=accepting_head(model))
    found = steered(model, value_steer=accept)
    del model.generation_config.value_steer
    assert torch.equal(found, steered(model))


@pytest.mark.parametrize("place", ["argument", "positional", "default"])
def test_a_generation_config_steers_a_wrapper(model, place):
    wrapper = ValueSteerForCausalLM(model, random_head(model), {"method": "filter", "threshold": 0.4, "seed": 1})
    other = {"method": "filter", "threshold": 0.4, "num_candidates": 2, "seed": 1}
    expected, inputs = steered(wrapper, value_steer=other), prompts(2)
    assert not torch.equal(expected, steered(wrapper))
    mine = GenerationConfig(**GREEDY, value_steer=other, eos_token_id=2, pad_token_id=0)
    if place == "argument":
        found = wrapper.generate(**inputs, generation_config=mine)
    elif place == "positional":
        found = wrapper.generate(inputs["input_ids"], mine, attention_mask=inputs["attention_mask"])
    else:
        wrapper.generation_config.value_steer = other
        found = steered(wrapper)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["config", "dict"])
def test_saving_a_model_whose_generation_config_steers_warns(model, form, tmp_path, caplog):
    random_head(model).save_pretrained(tmp_path / "head")
    config = {"method": "filter", "value_head": str(tmp_path / "head")}
    value_steer = config if form == "dict" else ValueFilterConfig(value_head=str(tmp_path / "head"))
    model.generation_config = GenerationConfig(value_steer=value_steer, eos_token_id=2, pad_token_id=0)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "model")
    assert "without it the loaded model writes unsteered text" in caplog.text
    again = enable_value_steer(type(model).from_pretrained(tmp_path / "model").eval())
    assert again.generation_config.value_steer == config
    assert torch.equal(steered(again), steered(model))


# B4: stop strings and criteria in every place.


@pytest.mark.parametrize("place", ["argument", "config", "positional", "default", "config and default"])
@pytest.mark.parametrize("stop", ["string", "list"])
def test_stop_strings_in_every_place(model, tokenizer, place, stop):
    free = steered(model, value_steer=rejecting(model))
    word = tokenizer.decode(free[0, 12])
    assert free[0, 11] != free[0, 12]
    stop = word if stop == "string" else [word, "another"]
    inputs, call = prompts(2), {"tokenizer": tokenizer, "value_steer": rejecting(model)}
    if place == "argument":
        found = steered(model, stop_strings=stop, **call)
    elif place in ("config", "positional", "config and default"):
        mine = GenerationConfig(**GREEDY, stop_strings=stop, eos_token_id=2, pad_token_id=0)
        if place == "config and default":
            model.generation_config.stop_strings = ["never"]
        if place == "positional":
            found = model.generate(inputs["input_ids"], mine, attention_mask=inputs["attention_mask"], **call)
        else:
            found = model.generate(**inputs, generation_config=mine, **call)
        assert mine.stop_strings == stop
    else:
        model.generation_config.stop_strings = stop
        found = steered(model, **call)
    assert torch.equal(found[0, 11:13], free[0, 11:13]) and (found[0, 13:] == 0).all()


def test_stop_strings_without_a_tokenizer_say_what_is_missing(model):
    with pytest.raises(ValueError, match="`stop_strings` need the tokenizer"):
        steered(model, stop_strings="w5", value_steer=rejecting(model))


class StopAt:
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("place", ["argument", "positional"])
def test_processors_and_criteria_by_position(model, place):
    inputs, config = prompts(2), rejecting(model)
    criteria = [StopAt(15)]
    expected = steered(model, value_steer=config)[:, :15]
    if place == "argument":
        found = steered(model, stopping_criteria=criteria, value_steer=config)
    else:
        mine = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
        found = model.generate(
            inputs["input_ids"], mine, [], criteria, attention_mask=inputs["attention_mask"], value_steer=config
        )
    assert torch.equal(found, expected)


# B7, B8: what stands on the instance.


def test_a_class_whose_generate_takes_no_further_arguments_is_refused():
    class Own(type(build("llama"))):
        def generate(self, input_ids, max_new_tokens=3):
            return input_ids

    model = build("llama")
    model.__class__ = Own
    with pytest.raises(TypeError, match="takes no further arguments"):
        enable_value_steer(model)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "twice"])
def test_pickles_and_copies_stay_enabled(model, way):
    expected = steered(model, value_steer=rejecting(model))
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copy.deepcopy(copy.deepcopy(model) if way == "twice" else model)
    assert torch.equal(steered(other, value_steer=rejecting(other)), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(steered(other, value_steer=rejecting(other)), expected)
    disable_value_steer(other)
    assert "generate" not in vars(other) and "save_pretrained" not in vars(other)


# B11: the reader of a streamer is released.


class Breaks(LogitsProcessor):
    def __init__(self, error, step):
        self.error, self.length = error, 11 + step

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise self.error
        return scores


FAILURES = {
    "a processor": lambda model: {
        "logits_processor": [Breaks(RuntimeError("no"), 3)],
        "value_steer": rejecting(model),
    },
    "at once": lambda model: {"logits_processor": [Breaks(RuntimeError("no"), 0)], "value_steer": rejecting(model)},
    "cancelled": lambda model: {"logits_processor": [Breaks(KeyboardInterrupt(), 2)], "value_steer": rejecting(model)},
    "a head": lambda model: {"value_steer": ValueFilterConfig(value_head=broken(model))},
    "an argument": lambda model: {"num_beams": 2, "value_steer": rejecting(model)},
    "a config": lambda model: {"value_steer": {"method": "filtre"}},
    "a wrong argument of transformers": lambda model: {"no_such": 1, "value_steer": rejecting(model)},
}


def broken(model):
    head = random_head(model)
    head.forward = lambda features, **_: (_ for _ in ()).throw(ZeroDivisionError("head"))
    return head


@pytest.mark.parametrize(
    ("door", "name"),
    [("enabled", name) for name in FAILURES]
    # Of wrong arguments the callable never learns.
    + [("callable", name) for name in FAILURES if name != "a wrong argument of transformers"],
)
def test_a_failing_call_releases_the_reader(model, tokenizer, name, door):
    streamer = TextIteratorStreamer(tokenizer, timeout=20)
    call = {**prompts(1), **GREEDY, **FAILURES[name](model)}
    if door == "callable":
        call |= {"custom_generate": value_steer_generate, "token_streamer": streamer}
    else:
        call["streamer"] = streamer
    errors = []

    def run():
        try:
            model.generate(**call)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    list(streamer)  # `queue.Empty` after the timeout if nobody ends it
    thread.join()
    assert len(errors) == 1


def test_a_failing_call_releases_an_asynchronous_reader(model, tokenizer):
    async def read():
        streamer = AsyncTextIteratorStreamer(tokenizer)
        call = {**prompts(1), **GREEDY, "streamer": streamer, **FAILURES["a processor"](model)}
        running = asyncio.get_running_loop().run_in_executor(None, lambda: model.generate(**call))
        pieces = [piece async for piece in streamer]
        with pytest.raises(RuntimeError, match="no"):
            await running
        return pieces

    assert asyncio.run(asyncio.wait_for(read(), 20))


def test_a_streamer_is_ended_once(model):
    class Counts:
        ends = 0

        def put(self, value):
            pass

        def end(self):
            self.ends += 1

    for failure in (None, "a processor", "an argument"):
        streamer = Counts()
        call = {"value_steer": rejecting(model)} if failure is None else FAILURES[failure](model)
        try:
            model.generate(**prompts(1), **GREEDY, streamer=streamer, **call)
        except (RuntimeError, ValueError):
            assert failure
        assert streamer.ends == 1


# A16: what is no probability is no value.


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan"), -0.5, 1.5])
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_a_value_that_is_no_probability_stops_the_call(model, value, evaluation):
    head = random_head(model)
    forward = head.forward

    def foreign(features, **options):
        out = forward(features, **options)
        out.value = torch.full_like(out.value, value)
        return out

    head.forward = foreign
    with pytest.raises(ScoringError, match="not finite|no probability"):
        steered(model, value_steer=ValueFilterConfig(value_head=head, threshold=0.5, evaluation=evaluation))


# A15: training mode.


@pytest.mark.parametrize("where", ["whole", "part"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_steers_as_evaluation_does(model, where, checkpointing):
    config = rejecting(model)
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    expected = steered(model, value_steer=config)
    (model if where == "whole" else model.model.layers[0]).train()
    if checkpointing:
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
    for evaluation in ("lazy", "eager"):
        assert torch.equal(steered(model, value_steer=rejecting(model, evaluation=evaluation)), expected)
    assert model.model.layers[0].training
