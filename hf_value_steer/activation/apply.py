"""Adding vectors to the residual stream of a live model, and taking them off again without a trace.

A layer is steered by giving it a subclass of its own class for a while, not by a forward hook: `torch.compile` guards
the classes of modules but not their hooks, so a graph that was compiled before would run on unsteered.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_value_steer.activation.residual import residual
from hf_value_steer.backbone import decoder_layers


if TYPE_CHECKING:
    from hf_value_steer.activation.vectors import SteeringVectors


Mode: TypeAlias = Literal["broadcast", "last_token"]
Tokens: TypeAlias = Literal["all", "prompt", "generated"]
_INJECTION = "_value_steer_injection"


class Steering:
    """What is added to a model at the moment.

    Args:
        multiplier (`float` or sequence of `float`): one for all rows, or one for each.
        mode, tokens: as in [`steered`].
        device: where the weights of rows and positions are kept.

    Attributes:
        weight (`torch.FloatTensor` of shape `(rows or 1, positions or 1, 1)`, *optional*): what the vectors are
            multiplied with in the forward that comes next, beside a multiplier for all rows.
        copies (`int`): how many rows the forward has for each row of `weight`.
        gate (`torch.BoolTensor` of shape `(rows,)`, *optional*): the rows that are steered now.
        told (`bool`): whether the caller says what each forward reads, and nothing has to be found out.
    """

    def __init__(self, multiplier: float | Sequence[float], mode: Mode, tokens: Tokens, device: torch.device):
        self.mode, self.tokens, self.copies, self.told = mode, tokens, 1, False
        self.gate: Tensor | None = None
        one = isinstance(multiplier, int | float)
        self.common: float = multiplier if one else 1.0  # type: ignore[assignment]
        self.rows = None if one else torch.tensor(multiplier, dtype=torch.float32, device=device)
        self.weight = None if self.rows is None else self.rows[:, None, None]
        self.device = device

    @property
    def positional(self) -> bool:
        """Whether it matters which position a forward reads."""
        return self.mode == "last_token" or self.tokens != "all"

    def read_prompt(self, mask: Tensor | None, length: int) -> None:
        """The forward that comes next reads a prompt.

        Args:
            mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 0 where there is padding.
            length (`int`): positions of the forward.
        """
        self.copies, where = 1, torch.ones(1, 1, 1, device=self.device)
        if self.tokens == "generated":
            where = torch.zeros_like(where)
        elif self.mode == "last_token":
            last = torch.tensor([length - 1]) if mask is None else length - 1 - mask.flip(-1).bool().int().argmax(-1)
            where = nn.functional.one_hot(last.long(), length).to(self.device, torch.float32)[:, :, None]
        self.weight = self._weight(where, None)

    def read_generated(self, rows: Tensor | None = None, copies: int = 1) -> None:
        """The forward that comes next reads generated tokens or candidates, `copies` batch rows for each of `rows`."""
        self.copies = copies
        where = torch.full((1, 1, 1), float(self.tokens != "prompt"), device=self.device)
        self.weight = self._weight(where, rows)

    def _weight(self, where: Tensor, rows: Tensor | None) -> Tensor | None:
        if self.rows is None and self.gate is None and not self.positional:
            return None
        for factor in (self.rows, self.gate):
            if factor is not None:
                chosen = factor if rows is None else factor[rows]
                where = where * chosen[:, None, None]
        return where


class _Injection:
    """What one layer adds."""

    def __init__(self, steering: Steering, vector: Tensor):
        self.steering, self.vector, self.width = steering, steering.common * vector, len(vector)
        self.added: Tensor | None = None

    def __call__(self, output: Any) -> Any:
        if self.steering.positional and not self.steering.told and torch.compiler.is_compiling():
            raise RuntimeError('Compiled models are steered with mode="broadcast" and tokens="all" only.')
        hidden = residual(output, self.width)
        changed = hidden + self._offset(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _offset(self, hidden: Tensor) -> Tensor:
        weight, rows, positions = self.steering.weight, hidden.shape[0], hidden.shape[1]
        if weight is None:
            if self.added is None or self.added.device != hidden.device or self.added.dtype != hidden.dtype:
                self.added = self.vector.to(hidden.device, hidden.dtype)
            return self.added
        fits = weight.shape[0] in (1, rows / self.steering.copies) and weight.shape[1] in (1, positions)
        if not fits:
            raise ValueError(
                f"Steering is set up for {weight.shape[0]} row(s) and {weight.shape[1]} position(s), but the model "
                f"reads {rows} and {positions}: pass one multiplier for each row of the (expanded) batch."
            )
        if self.vector.device != hidden.device:
            self.vector = self.vector.to(hidden.device)
        if weight.shape[0] > 1:
            weight = weight.repeat_interleave(self.steering.copies, dim=0)
        return (weight.to(hidden.device) * self.vector).to(hidden.dtype)


@cache
def _steered_class(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, whose instances add their injection to what they hand on."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_INJECTION](kind.forward(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _inject(layer: nn.Module, injection: _Injection, undo: ExitStack) -> None:
    own = vars(layer).get("forward")
    if own is not None:  # `accelerate` has put a forward on the instance, which the class's would not reach
        undo.callback(vars(layer).__setitem__, "forward", own)
        vars(layer)["forward"] = lambda *args, **kwargs: injection(own(*args, **kwargs))
    else:
        undo.callback(setattr, layer, "__class__", type(layer))
        layer.__class__ = _steered_class(type(layer))  # type: ignore[arg-type]
    undo.callback(vars(layer).pop, _INJECTION)
    vars(layer)[_INJECTION] = injection


def is_steered(model: PreTrainedModel) -> bool:
    """Whether vectors are applied to `model` now."""
    return any(_INJECTION in vars(layer) for layer in decoder_layers(model))


@contextmanager
def steered(
    model: PreTrainedModel,
    vectors: "SteeringVectors",
    multiplier: float | Sequence[float] = 1.0,
    mode: Mode = "broadcast",
    tokens: Tokens = "all",
    allow_backbone_mismatch: bool = False,
) -> Iterator[Steering]:
    """Steer `model` inside a `with` block. Afterwards, also after an exception, it is what it was.

    Works with whatever calls the model: `generate` in all its modes, pipelines, training loops. `torch.compile` and
    static caches need `mode="broadcast"` and `tokens="all"`.

    Args:
        model: the backbone; float or quantised, on one device or several.
        vectors: of this model.
        multiplier (`float` or sequence of `float`): how much; one for each row of the batch that the model reads
            (after `num_return_sequences` and beams), or one for all. Negative numbers steer the other way.
        mode (`str`): `"broadcast"` adds at every position; `"last_token"` at the last position of a prompt and at the
            tokens generated after it, whose earlier text stays as it was in the cache.
        tokens (`str`): of `"all"`, or only those of the `"prompt"`, or only the `"generated"` ones.
        allow_backbone_mismatch (`bool`): use vectors that were made for another backbone of this shape.

    Raises:
        ValueError: before anything is changed: for vectors that do not fit, and for a model that is steered already.
    """
    check_choices(multiplier, mode, tokens)
    vectors.check_fit(model, allow_backbone_mismatch)
    if is_steered(model):
        raise ValueError("This model is steered by vectors already: leave that `with` block first.")
    steering = Steering(multiplier, mode, tokens, model.device)
    layers = decoder_layers(model)
    with ExitStack() as undo:
        for index, vector in zip(vectors.layers, vectors.strengths[:, None] * vectors.directions, strict=True):
            _inject(layers[index], _Injection(steering, vector), undo)
        if steering.positional:
            undo.callback(model.register_forward_pre_hook(partial(_watch, steering), with_kwargs=True).remove)
        yield steering


def check_choices(multiplier: float | Sequence[float], mode: str, tokens: str) -> None:
    """Raise a `ValueError` for arguments of [`steered`] that make no sense."""
    numbers = [multiplier] if isinstance(multiplier, int | float) else list(multiplier)
    if not numbers or not all(isinstance(number, int | float) and abs(number) < float("inf") for number in numbers):
        raise ValueError(f"`multiplier` has to be a finite number, or one for each row; got {multiplier}.")
    for name, choice, choices in (("mode", mode, get_args(Mode)), ("tokens", tokens, get_args(Tokens))):
        if choice not in choices:
            raise ValueError(f"`{name}` has to be one of {', '.join(choices)}, got {choice!r}.")


def _watch(steering: Steering, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find out from the arguments of a forward what it reads, unless the decoding engine has said so."""
    if steering.told:
        return
    ids = args[0] if args else kwargs.get("input_ids")
    length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    past = kwargs.get("past_key_values", kwargs.get("cache_params"))
    if past is None or past.get_seq_length() == 0:
        mask = kwargs.get("attention_mask")
        steering.read_prompt(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, length)
    elif length == 1:
        steering.read_generated()
    else:
        raise ValueError(
            f"This forward reads {length} tokens after others in a cache: whether they are prompt or generated cannot "
            'be told. Steer it with mode="broadcast" and tokens="all".'
        )
