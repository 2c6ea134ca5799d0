"""Steering vectors as a method: it tells the injections what each forward reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_value_steer.activation.apply import Injection, injected
from hf_value_steer.activation.steering_vectors import vectors_of
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.gate import Gate
from hf_value_steer.generation.method import Method
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.state import Reading


class Vectors(Method):
    """Vectors on the layers of a shadow, for as long as the call lasts.

    The engine enters [`around_forward`] around every forward: it tells the injection which rows are read, and whether
    they are prompt or generated.

    Args:
        injection: what is added; every layer asks it in each forward.
    """

    needs_loop = False
    nests = True

    def __init__(self, injection: Injection):
        self.injection = injection
        self.row: Tensor | None = None  # of a copy for one row

    def separate(self, row: int, stops: Stops) -> None:  # noqa: ARG002
        self.row = torch.tensor([row], device=self.injection.device)

    @classmethod
    def bind(cls, config: ActivationConfig, call: Call) -> list[Method]:
        """The vectors that `config` asks for, and the gate before them if it names a head."""
        multiplier = config.multiplier
        if isinstance(multiplier, tuple) and len(multiplier) != call.rows:
            raise ValueError(
                f"`multiplier` has {len(multiplier)} entries, but the returned batch has {call.rows} rows."
            )
        how = (multiplier, config.mode, config.tokens, config.allow_backbone_mismatch)
        injection = call.contexts.enter_context(injected(call.model, vectors_of(config.vectors), *how))
        if config.mode == "last_token" and call.config.prefill_chunk_size is not None:
            raise ValueError('A prompt in chunks (`prefill_chunk_size`) is not steered with mode="last_token".')
        if config.value_head is None:
            return [cls(injection)]
        return [cls(injection), Gate(call.bind(config), injection, config.min_new_tokens)]

    @contextmanager
    def around_forward(self, reading: Reading) -> Iterator[None]:
        """Tell the injection what is read, which it need not find out from the arguments of the forward then."""
        before = self.injection.weight, self.injection.copies
        self.injection.told = True
        if reading.prompt is not None:
            self.injection.read_prompt(reading.mask, reading.prompt)
        else:
            self.injection.read_generated(reading.rows if self.row is None else self.row, reading.copies)
        try:
            yield
        finally:  # the forward around this one goes on
            self.injection.weight, self.injection.copies = before
