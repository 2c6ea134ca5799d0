"""What passes between the loop, the engine and the methods in one step."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from hf_value_steer.backbone.features import Features
from hf_value_steer.policy import Decision


Batch = TypeVar("Batch")  # a dataclass of tensors `(rows, ...)`


def of_row(batch: Batch, row: int) -> Batch:
    """The same of one row alone: each of its tensors becomes `(1, ...)`."""
    return _each(batch, lambda tensor, _: tensor[row : row + 1])


def with_row(batch: Batch, row: int, one: Batch) -> Batch:
    """The same with another entry in one row, that of `one`, which has no other."""

    return _each(batch, lambda tensor, name: put_row(tensor, row, getattr(one, name)))


def put_row(tensor: Tensor, row: int, one: Tensor) -> Tensor:
    """`tensor` `(rows, ...)` with another entry in one row: `one` `(1, ...)`."""
    changed = tensor.clone()
    changed[row] = one[0].to(tensor)
    return changed


def _each(batch: Batch, function: Callable[[Tensor, str], Tensor]) -> Batch:
    mine = {each.name: getattr(batch, each.name) for each in fields(batch)}  # type: ignore[arg-type]
    changed = {name: function(it, name) for name, it in mine.items() if isinstance(it, Tensor)}
    return replace(batch, **changed)  # type: ignore[type-var]


@dataclass
class State:
    """What the last token left behind, for each row. A step returns it; the loop draws the next token from its logits.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, vocab)`): float32, raw.
        features ([`Features`]): what was read of it, `(rows, width)` by layer.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in the model's output.
    """

    logits: Tensor
    features: Features
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Reading:
    """What the forward that comes next reads. The engine makes it, and gives it to [`Method.around_forward`].

    Args:
        rows (`torch.LongTensor`, *optional*): rows of the batch, all if `None`.
        copies (`int`): number of rows that the forward has for each of them.
        cache ([`~transformers.Cache`]): that of the forward.
        prompt (`int`, *optional*): number of tokens, if it reads a prompt.
        mask (`torch.Tensor` of shape `(batch, length)`, *optional*): padding mask of a prompt.
        begins (`bool`): whether it is the first forward of a step.
    """

    cache: Cache
    rows: Tensor | None = None
    copies: int = 1
    prompt: int | None = None
    mask: Tensor | None = None
    begins: bool = False


@dataclass
class TakenBack:
    """A token that was taken back.

    Args:
        step (`int`): number of new tokens before it.
        token (`int`), value (`float`): it.
    """

    step: int
    token: int
    value: float


@dataclass
class Draw:
    """What a step starts from, all of shape `(batch, ...)`. The loop makes it, and methods may change its tokens.

    Args:
        step (`int`): number of new tokens so far.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far.
        logits (`torch.FloatTensor` of shape `(batch, vocab)`): raw.
        permitted (`torch.FloatTensor` of shape `(batch, vocab)`): scores before anything that only narrows the
            sampling; `-inf` is what the call forbids.
        scores (`torch.FloatTensor` of shape `(batch, vocab)`): processed scores.
        tokens (`torch.LongTensor` of shape `(batch,)`): natural samples; methods put prescribed tokens in.
        live (`torch.BoolTensor` of shape `(batch,)`): rows whose token counts.
        forced (`torch.BoolTensor` of shape `(batch,)`): rows whose token is prescribed by a method.
        impossible (`torch.BoolTensor` of shape `(batch,)`): live rows in which the processors allow no token.
        visit (`int`): how often a search has come to this place before; part of the key of random numbers.
        candidates (`torch.LongTensor` of shape `(batch, K)`, *optional*): in a search, what a judge is to choose from,
            instead of what it would propose; -1 where there is none.
    """

    step: int
    input_ids: Tensor
    logits: Tensor
    permitted: Tensor
    scores: Tensor
    tokens: Tensor
    live: Tensor
    forced: Tensor
    impossible: Tensor
    visit: int = 0
    candidates: Tensor | None = None

    def refuse_impossible(self) -> None:
        """Raise a `ValueError` if there is a row without any token to draw."""
        if bool(self.impossible.any()):
            rows = self.impossible.nonzero().flatten().tolist()
            raise ValueError(f"The logits processors allow no token at new token {self.step} in row(s) {rows}.")

    def text(self) -> Tensor:
        """The text with the drawn tokens, `(batch, length + 1)`."""
        return torch.cat([self.input_ids, self.tokens[:, None]], dim=-1)


@dataclass(frozen=True)
class Chosen:
    """Which candidate each row goes on with, of those that were forwarded.

    Args:
        slots (`torch.LongTensor` of shape `(rows,)`): where it stands among them.
        tokens (`torch.LongTensor` of shape `(rows,)`): it.
        decision ([`~hf_value_steer.policy.Decision`]): what the judge has said.
    """

    slots: Tensor
    tokens: Tensor
    decision: Decision

    def each(self, function: Callable[[Tensor], Tensor]) -> "Chosen":
        """The same after `function` of every tensor."""
        decision = Decision(**{name: function(tensor) for name, tensor in vars(self.decision).items()})
        return Chosen(function(self.slots), function(self.tokens), decision)


# Chooses by the features of the candidates, `(rows, K, width)` by layer. A step gives it to the engine.
Choose: TypeAlias = Callable[[Features], Chosen]


@dataclass
class Outcome:
    """What a step committed, all of shape `(batch, ...)`; see [`ValueSteerDecoderOnlyOutput`] for the fields.

    A step returns it, and the loop gives it to the methods and to the record.

    Args:
        natural (`torch.FloatTensor` of shape `(batch,)`): values of the natural samples.
        room ([`Room`], *optional*): what was chosen from, where the natural samples were not simply kept.
        refusals (`list`): what nobody has waited for yet, a boolean `()` on the device each, and what raises the error
            if it is true. The loop asks before a token is shown.
    """

    tokens: Tensor
    evaluated: Tensor
    values: Tensor
    natural: Tensor
    room: "Room | None" = None
    refusals: list[tuple[Tensor, Callable[[], None]]] = field(default_factory=list)

    def make_room(self, draw: Draw, most: int) -> "Room":
        """What a judge has chosen from, and how, as if all natural samples were kept.

        Most steps of most calls need none of it, so it is made when it is asked for first.
        """
        if self.room is None:
            shape, device = (len(draw.tokens), most), draw.tokens.device
            candidates, values = torch.full(shape, -1, device=device), torch.full(shape, torch.nan, device=device)
            candidates[:, 0], values[:, 0] = draw.tokens.masked_fill(~draw.live, -1), self.natural
            nowhere = torch.zeros_like(draw.live)
            self.room = Room(candidates, values, torch.zeros_like(draw.tokens), nowhere, nowhere.clone())
        return self.room


@dataclass
class Room:
    """What a judge has chosen from, and how, all of shape `(batch, ...)`.

    Args:
        candidates (`torch.LongTensor` of shape `(batch, K)`): -1 where there is none.
        values (`torch.FloatTensor` of shape `(batch, K)`): theirs; NaN where nobody has asked.
        columns (`torch.LongTensor` of shape `(batch,)`): which of them was committed.
        ended (`torch.BoolTensor` of shape `(batch,)`): rows that were ended.
        dead_ends (`torch.BoolTensor` of shape `(batch,)`): rows in which no candidate was acceptable.
    """

    candidates: Tensor
    values: Tensor
    columns: Tensor
    ended: Tensor
    dead_ends: Tensor
