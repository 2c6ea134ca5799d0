"""What lazy and eager steps of a call cost: steps of both kinds are timed once, and the cheaper kind is taken.

`evaluation="auto"` asks for it. Lazy and eager steps keep the same tokens, so this decides about time alone.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging

from hf_value_steer.generation.call import Call
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.forwards import any_hooked
from hf_value_steer.generation.kernels import Kernel
from hf_value_steer.generation.method import Method, all_nest, around
from hf_value_steer.generation.state import Draw
from hf_value_steer.generation.steps import Eager, Lazy, Step
from hf_value_steer.hosts.transformers import attention_of, cache_name


logger = logging.get_logger(__name__)
STEPS = 4  # of each kind that are timed, behind one that is not


@dataclass(frozen=True)
class Costs:
    """Seconds of a step.

    Args:
        lazy (`float`): of a lazy one that keeps all natural samples.
        look (`float`): of a lazy one that looks at alternatives in one row.
        eager (`float`): of an eager one.
    """

    lazy: float
    look: float
    eager: float

    @property
    def break_even(self) -> float:
        """The share of steps with a look at alternatives from which on eager steps are cheaper."""
        return (self.eager - self.lazy) / max(self.look - self.lazy, 1e-9)


_measured: dict[tuple[Any, ...], Costs] = {}


def break_even(call: Call, methods: Sequence[Method], kernel: Kernel, depth: int | None) -> float:
    """The share of steps with a look at alternatives from which on this call takes eager steps.

    It is infinite where nothing can be timed without a trace: where hooks of the user would run, or methods that keep
    count of forwards; and where timing fails, for want of memory say.
    """
    if any_hooked(call.model.modules()) or not all_nest(methods):
        return math.inf
    try:
        return costs_of(call, methods, kernel, depth).break_even
    except Exception as error:  # whatever it is: the call itself may do without
        logger.warning("No steps could be timed for evaluation='auto', so lazy ones are taken: %s", error)
        return math.inf


def costs_of(call: Call, methods: Sequence[Method], kernel: Kernel, depth: int | None) -> Costs:
    """The costs of steps of a call, measured at the first call of its kind in a process.

    They are those of short texts, of the same batch size, with the call's own model, head and number of candidates.

    Args:
        methods: of the call; one of them judges.
        kernel: how its candidates are forwarded.
        depth (*optional*): the layer at which tokens are judged.
    """
    model, judge = call.model, next(method for method in methods if method.judges)
    size = (type(model).__name__, model.num_parameters(), model.dtype, model.device)
    kind = (
        *size,
        call.rows,
        judge.most,
        type(kernel),
        attention_of(model.config.get_text_config(decoder=True)),
        depth,
    )
    if kind not in _measured:
        _measured[kind] = _measure(call, methods, judge, kernel, depth)
    return _measured[kind]


def _measure(call: Call, methods: Sequence[Method], judge: Method, kernel: Kernel, depth: int | None) -> Costs:
    """The least of some steps of each kind, which take turns."""
    rejecting, accepting = (_Prescribed(judge, rejects) for rejects in (True, False))
    engines = [_engine(call, methods, judge, kernel, depth) for _ in range(3)]
    steps: tuple[Step, ...] = (Lazy(engines[0], accepting), Lazy(engines[1], rejecting), Eager(engines[2], accepting))
    turns = list(zip(*(_times(call, *each) for each in zip(engines, steps, strict=True)), strict=True))
    return Costs(*map(min, zip(*turns[1:], strict=True)))


def _engine(call: Call, methods: Sequence[Method], judge: Method, kernel: Kernel, depth: int | None) -> Engine:
    """One without a text, beside that of the call."""
    kwargs = {name: each for name, each in call.model_kwargs.items() if not isinstance(each, Tensor)}
    kwargs[cache_name(kwargs)] = DynamicCache(config=call.model.config.get_text_config(decoder=True))
    return Engine(call.prepared, kwargs, kernel, partial(around, methods), reads=judge.reads, depth=depth)


def _times(call: Call, engine: Engine, step: Step) -> Iterator[float]:
    """Seconds of each of some steps of a text that begins with the last token of the prompt."""
    text = call.input_ids[:, -1:] if call.input_ids.shape[1] else call.input_ids.new_ones(call.rows, 1)
    engine.model_kwargs["attention_mask"] = torch.ones_like(text)
    tokens, live = text[:, 0], torch.ones_like(text[:, 0], dtype=torch.bool)
    state = engine.prefill(text, call.config)
    for number in range(1 + STEPS):
        start = time.perf_counter()
        state, outcome = step(Draw(number, text, *(state.logits,) * 3, tokens, live, ~live, ~live))
        outcome.tokens.tolist()  # the host waits for the device
        yield time.perf_counter() - start
        text = torch.cat([text, outcome.tokens[:, None]], dim=-1)
        engine.commit()


class _Prescribed(Method):
    """A judge that rejects nothing, or the natural samples of the first row; else it is as `judge`."""

    def __init__(self, judge: Method, rejects: bool):
        self.judge, self.rejects = judge, rejects
        self.reads, self.most = judge.reads, judge.most
        self.propose, self.decide = judge.propose, judge.decide  # type: ignore[method-assign]

    def values(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.judge.values(features, rows).nan_to_num(0.5)

    def acting(self, draw: Draw) -> Tensor:
        return torch.ones_like(draw.live)

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:  # noqa: ARG002
        accepted = torch.ones_like(values, dtype=torch.bool)
        accepted[0] = not self.rejects
        return accepted
