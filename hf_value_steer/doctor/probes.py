"""What the doctor measures inside a generation: features of the same token by different ways through the engine."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_value_steer.backbone.features import Layer
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.parse import parse_value_steer
from hf_value_steer.generation.binding import bind_methods
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.costs import Costs, costs_of
from hf_value_steer.generation.depth import judged_at
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.validation import refuse_unsupported
from hf_value_steer.hosts.transformers import cache_name


def held_and_fresh(cache: Cache, layers: Sequence[Layer]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A `custom_generate` that returns the last token's features `(rows, width)` twice.

    Once by one more step on `cache`, once by a prefill of the whole text.
    """

    def measure(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        prepared = PreparedModel(model)
        model_kwargs, kernel = _forward_arguments(kwargs), choose_kernel("auto", prepared.model)
        held = Engine(prepared, {**model_kwargs, cache_name(model_kwargs): cache}, kernel, reads=layers)
        length = input_ids.shape[1] - 1
        if held.live.length not in (0, length):  # 0: recurrent states do not count
            raise RuntimeError(f"the cache of {length} tokens holds {held.live.length}: rollback fails")
        empty = Engine(prepared, model_kwargs, kernel, reads=layers)
        prefilled = empty.prefill(input_ids, generation_config).features
        return held.read(input_ids).features.of(layers)[:, -1], prefilled.of(layers)

    return measure


def step_by_step(layers: Sequence[Layer]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A `custom_generate` that returns a greedy text, and the features `(rows, new tokens, width)` of its steps."""

    def measure(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        prepared = PreparedModel(model)
        engine = Engine(prepared, _forward_arguments(kwargs), choose_kernel("auto", prepared.model), reads=layers)
        state, features = engine.prefill(input_ids, generation_config), []
        for _ in range(generation_config.max_new_tokens):
            input_ids = torch.cat([input_ids, state.logits.argmax(dim=-1, keepdim=True)], dim=1)
            state = engine.compute_state(engine.read(input_ids), input_ids.device)
            engine.commit()
            features.append(state.features.of(layers))
        return input_ids, torch.stack(features, dim=1)

    return measure


def alone_and_among(count: int, layers: Sequence[Layer]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A `custom_generate` that returns features `(positions, K, width)` of tokens alone, and among K candidates."""

    def measure(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        model_kwargs = _forward_arguments(kwargs)
        refuse_unsupported(model, generation_config, model_kwargs)
        prepared = PreparedModel(model)
        engine = Engine(prepared, model_kwargs, choose_kernel("auto", prepared.model), reads=layers)
        state, alone, among = engine.prefill(input_ids, generation_config), [], []
        for _ in range(generation_config.max_new_tokens):
            candidates = state.logits.topk(count).indices
            rows = [_one_row(prepared, engine, input_ids, token, layers) for token in candidates[0]]
            alone.append(torch.cat(rows))
            among.append(engine.look_ahead(input_ids, candidates).features.of(layers))
            input_ids = torch.cat([input_ids, candidates[:, :1]], dim=1)
            state = engine.compute_state(engine.read(input_ids), input_ids.device)
            engine.commit()
        return torch.stack(alone), torch.cat(among)

    return measure


def timed(config: ValueFilterConfig) -> Callable[..., Costs]:
    """A `custom_generate` that returns what steps of the filter cost."""

    def measure(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> Costs:
        with ExitStack() as contexts:
            prepared, stops = PreparedModel(model), Stops.none(len(input_ids), input_ids.device)
            asked = parse_value_steer(config)
            call = Call(prepared, generation_config, input_ids, _forward_arguments(kwargs), asked, stops, contexts)
            methods = bind_methods(call)
            return costs_of(call, methods, choose_kernel("auto", prepared.model), judged_at(call, methods))

    return measure


def _one_row(
    prepared: PreparedModel, engine: Engine, input_ids: Tensor, token: Tensor, layers: Sequence[Layer]
) -> Tensor:
    """Feature `(1, width)` of `token` by an ordinary step on a copy of the cache."""
    name = cache_name(engine.model_kwargs)
    model_kwargs = {**engine.model_kwargs, name: copy.deepcopy(engine.model_kwargs[name])}
    branch = Engine(prepared, model_kwargs, engine.kernel, reads=layers)
    return branch.read(torch.cat([input_ids, token.view(1, 1)], dim=1)).features.of(layers)[:, -1]


def _forward_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of what `generate` hands to a `custom_generate`, what the forward takes."""
    return {name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria")}


def relative(left: Tensor, right: Tensor) -> float:
    """Norm of the difference, relative to `right`."""
    return float((left - right).norm() / right.norm())


def standardized(left: Tensor, right: Tensor, deviation: Tensor) -> float:
    """Root mean square difference of two features in standard deviations of each entry, of the worst row."""
    difference = (left.float() - right.float()) / deviation
    return float(difference.square().mean(dim=-1).sqrt().max())
