"""The protocol of methods: what the loop asks of a way to steer. The loop knows no method, only this."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_value_steer.backbone.features import ONLY_FINAL, Features, Layer
from hf_value_steer.choices import Evaluation
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import require_finite
from hf_value_steer.generation.state import Draw, Outcome, Reading, TakenBack
from hf_value_steer.policy import Candidates, Decision


class Bindable(Protocol):
    """What `value_steer` takes beside configs: a method of the user's own. [`bind`] is called once in each call."""

    method: str

    def bind(self, call: Call) -> Sequence["Method"]:
        """The methods that take part in this call."""


class Method:
    """A way to steer, bound to one call. The loop calls its hooks, none of which does anything by default.

    Attributes:
        needs_loop (`bool`): whether our loop has to run. `False` for what acts by itself once it is bound, as vectors
            do: if that is so of all methods, the loop of plain `generate` runs, and no hook is called.
        values_texts (`bool`): whether [`values`] answers. The values of the judge are reported, else those of the
            first method that answers.
        reads (`tuple`): the layers whose states [`values`] is given: numbers of decoder layers, from 0, or `"final"`,
            what the output embedding consumes. None for a judge of text, which [`values_before`] asks.
        judges (`bool`): whether it decides which tokens are kept, by [`acting`], [`accepts`], [`propose`] and
            [`decide`]. One method may.
        evaluation (`str`): of a judge: `"eager"` to see all candidates of every token, `"lazy"` to see them only where
            the natural sample is not acceptable, `"auto"` for what is cheaper.
        most (`int`): the most candidates that it proposes, an ending token included.
        lookahead (`str`): how candidates are to be forwarded, or `"auto"`.
        last_token_apart (`bool`): whether the last token of a prompt has to be read by a forward of its own.
        back (`int`): of a judge: how many tokens may be taken back where it accepts no candidate. It has to know
            [`visit`] then.
        nests (`bool`): whether [`around_forward`] may be entered in the middle of another forward, and twice for one
            in two parts. Else tokens are judged behind the last layer, whatever layers the judge reads.
        rowwise (`tuple` of `str`): its attributes that have one entry a row: its state, which can be taken back.
    """

    needs_loop: bool = True
    values_texts: bool = False
    reads: tuple[Layer, ...] = ONLY_FINAL
    judges: bool = False
    evaluation: Evaluation = "lazy"
    most: int = 1
    lookahead: str = "auto"
    last_token_apart: bool = False
    back: int = 0
    nests: bool = False
    rowwise: ClassVar[tuple[str, ...]] = ()

    @property
    def follows(self) -> bool:
        """Whether its state can be that of an earlier token again: [`restore`] knows of it, or there is none.

        There is none where nothing is observed or prescribed. A class that knows better may say so itself.
        """
        says = bool(self.rowwise) or type(self).restore is not Method.restore
        return says or (type(self).observe is Method.observe and type(self).prescribe is Method.prescribe)

    def around_forward(self, reading: Reading) -> AbstractContextManager[Any]:  # noqa: ARG002
        """A context for one forward, which reads what `reading` says. The engine enters it."""
        return nullcontext()

    def values(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Values `(n, ...)` in [0, 1] of texts whose last token has the features `(n, ..., width)`.

        NaN says that there is none: the call then ends with an error. Steps and moments ask.

        Args:
            features (`torch.FloatTensor`): at the layers that the method `reads`, side by side.
            rows (`torch.LongTensor` of shape `(n,)`, *optional*): of the batch, all if left out.
        """
        raise NotImplementedError

    def values_before(self, draw: Draw, rows: Tensor, tokens: Tensor, asked: Tensor) -> Tensor:
        """The same `(n, K)` of candidates of some rows that were not forwarded, of a judge that reads no layer.

        Args:
            draw, rows: as in [`propose`].
            tokens (`torch.LongTensor` of shape `(n, K)`): the candidates.
            asked (`torch.BoolTensor` of shape `(n, K)`): of which there is to be a value; elsewhere it is NaN.
        """
        raise NotImplementedError

    def totals(self) -> Mapping[str, Any]:
        """Fields of [`ValueSteerDecoderOnlyOutput`] that are known at the end. The loop asks."""
        return {}

    def prescribe(self, draw: Draw) -> None:
        """Put tokens in the place of natural samples.

        Write them into `draw.tokens`, and set `draw.forced` `(batch,)` in their rows. The loop calls this once a step.
        """

    def acting(self, draw: Draw) -> Tensor:
        """Rows `(batch,)` in which the judge would replace a natural sample now. Asked by the step.

        Rows whose token does not count, or is prescribed, are left out by the step itself.
        """
        raise NotImplementedError

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:
        """Which natural samples of these values `(batch,)` are kept; NaN is not. Asked by a lazy step."""
        raise NotImplementedError

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        """Candidates of some rows, the natural sample first. Asked by the step.

        Args:
            draw: what the step starts from.
            rows (`torch.LongTensor` of shape `(n,)`): rows of the batch.
            known (`torch.BoolTensor` of shape `(n,)`): where the value of the natural sample is known.
            acting (`torch.BoolTensor` of shape `(n,)`): where there may be others than the natural sample.
        """
        raise NotImplementedError

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        """Choose among what [`propose`] gave, as a rule by [`~hf_value_steer.policy.decide`]. Asked by the step.

        Args:
            draw, rows, acting: as in [`propose`].
            values (`torch.FloatTensor` of shape `(n, columns)`): of the candidates.
        """
        raise NotImplementedError

    def observe(self, moment: "Moment") -> None:
        """Take notice of a prompt, or of the token that each row has committed. The loop calls this."""

    def record(self, moment: "Moment") -> Mapping[str, Tensor]:  # noqa: ARG002
        """Entries of this token for fields of [`ValueSteerDecoderOnlyOutput`], `(batch, ...)` each. The loop asks."""
        return {}

    def visit(self, draw: Draw) -> Tensor:
        """Candidates of a place that a search comes to, `(1, K)`, -1 where there is none. The search asks a judge.

        They are drawn as those of a step are, the natural sample first, but all from random numbers of the row's own.

        Args:
            draw: of the one row; its `scores` are `-inf` where a token was rejected at this place.
        """
        raise NotImplementedError

    def rewritten(self, row: int, moments: Sequence["Moment"], taken: Sequence[TakenBack]) -> None:
        """The last tokens of a row are others now. A search that has found another way tells it once.

        The state of the row is that after these tokens already.

        Args:
            row (`int`): of the batch.
            moments: what there is to tell of these tokens, of the whole batch.
            taken: the tokens that the search has taken back, in order.
        """

    def of_row(self, row: int, stops: Stops) -> "Method":
        """A copy for one row alone, which goes on from the present state, while this method stays as it is.

        Args:
            row (`int`): of the batch.
            stops: of this row; what the copy notes, it notes there.
        """
        one = copy.copy(self)
        one.separate(row, stops)
        for name in self.rowwise:
            setattr(one, name, getattr(self, name)[row : row + 1].clone())
        return one

    def separate(self, row: int, stops: Stops) -> None:
        """Called on a copy for one row: let it have parts of its own where it would share them."""

    def snapshot(self) -> Mapping[str, Tensor]:
        """The state of every row, as it is now, `(batch, ...)` each."""
        return {name: getattr(self, name).clone() for name in self.rowwise}

    def restore(self, rows: Tensor | slice, state: Mapping[str, Tensor]) -> None:
        """Let these rows be in another state, which has an entry for each of them."""
        for name, other in state.items():
            now = getattr(self, name).clone()
            now[rows] = other
            setattr(self, name, now)


def all_nest(methods: Sequence[Method]) -> bool:
    """Whether what the methods do around a forward may be entered again inside it; see [`Method`]."""
    inside = [method for method in methods if type(method).around_forward is not Method.around_forward]
    return all(method.nests for method in inside)


@contextmanager
def around(methods: Sequence[Method], reading: Reading) -> Iterator[None]:
    """What all methods do around a forward. The engine enters it: it may not lead back to the loop, which holds it."""
    with ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.around_forward(reading))
        yield


def recorded(methods: Sequence[Method], moment: "Moment") -> dict[str, Tensor]:
    """What goes into the record of the token that each row has committed, `(batch, ...)` each."""
    draw, outcome = moment.draw, moment.outcome
    assert draw is not None and outcome is not None  # of a prompt there is no record
    fields = {
        "token_values": outcome.values,
        "interventions": outcome.tokens != draw.tokens,
        "candidates_evaluated": outcome.evaluated,
    }
    for method in methods:
        fields |= method.record(moment)
    return fields


@dataclass
class Moment:
    """Every row has committed a token, or its prompt was read.

    The loop makes one after the prompt and after each step, and gives it to every method: [`Method.observe`],
    [`Method.record`].

    Args:
        step (`int`): number of new tokens; 0 is the prompt.
        features ([`Features`]): of the last token of each row, `(batch, width)` by layer.
        live (`torch.BoolTensor` of shape `(batch,)`): rows whose token counts.
        unfinished (`torch.BoolTensor` of shape `(batch,)`): rows that go on.
        draw, outcome (*optional*): what the token was drawn from, and what came of it.
    """

    step: int
    features: Features
    live: Tensor
    unfinished: Tensor
    draw: Draw | None = None
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.known: dict[int, Tensor] = {}  # values, by `id` of the method that has them

    def know(self, method: Method, values: Tensor) -> None:
        """The values `(batch,)` of a method were computed elsewhere."""
        self.known[id(method)] = values

    def values_of(self, method: Method) -> Tensor:
        """Values `(batch,)` of the texts by a method, computed once; NaN in rows whose token does not count.

        Raises:
            ScoringError: if there is none for a row whose token counts.
        """
        if id(method) not in self.known:
            values = method.values(self.features.of(method.reads)).masked_fill(~self.live, torch.nan)
            require_finite(values, self.live, max(self.step - 1, 0))
            self.known[id(method)] = values
        return self.known[id(method)]
