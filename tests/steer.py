"""What many tests generate: a few tokens of padded prompts, steered or not, from a seed."""

from typing import Any

from transformers import PreTrainedModel, set_seed

from hf_value_steer import ValueFilterConfig, value_steer_generate
from tests.families import accepting_head, prompts, random_head


GREEDY = {"do_sample": False, "max_new_tokens": 10}


def accepting(model: PreTrainedModel, **options: Any) -> ValueFilterConfig:
    """A filter that rejects nothing."""
    return ValueFilterConfig(value_head=accepting_head(model), **options)


def rejecting(model: PreTrainedModel, **options: Any) -> ValueFilterConfig:
    """A filter that rejects some tokens."""
    return ValueFilterConfig(**{"value_head": random_head(model), "threshold": 0.4, "num_candidates": 4, **options})


def steer(model: PreTrainedModel, config: Any = None, seed: int = 0, **arguments: Any) -> Any:
    """What `generate` returns: steered unless there is no `config`; by default greedy, of three prompts."""
    set_seed(seed)
    inputs = {} if {"input_ids", "inputs_embeds"} & arguments.keys() else prompts(3)
    steering = {} if config is None else {"custom_generate": value_steer_generate, "value_steer": config}
    return model.generate(**{**inputs, **GREEDY, "return_dict_in_generate": True, **arguments}, **steering)
