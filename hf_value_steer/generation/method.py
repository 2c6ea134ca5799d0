"""The protocol of methods: what the loop asks of a way to steer. The loop knows no method, only this."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.scorer import require_finite
from hf_value_steer.generation.state import Draw, Outcome, Reading
from hf_value_steer.policy import Candidates, Decision


@dataclass
class Call:
    """One steered `generate` call, as methods see it when they are bound to it.

    Args:
        prepared: a shadow of the backbone, which belongs to this call.
        config: the prepared generation config.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt.
        model_kwargs: what `generate` prepared for the model's forward.
        asked (`dict`): everything that the call asks for, by name of the method.
        stops: which rows were ended, when and why; methods note it.
        open: contexts that are left when the call ends.
    """

    prepared: PreparedModel
    config: GenerationConfig
    input_ids: Tensor
    model_kwargs: dict[str, Any]
    asked: Mapping[str, Any]
    stops: Stops
    open: ExitStack

    @property
    def model(self) -> PreTrainedModel:
        """The shadow itself."""
        return self.prepared.model

    @property
    def rows(self) -> int:
        """Rows of the returned batch."""
        return len(self.input_ids)

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self.input_ids.device


class Bindable(Protocol):
    """What `value_steer` takes beside configs: a method of the user's own. [`bind`] is called once in each call."""

    method: str

    def bind(self, call: Call) -> Sequence["Method"]:
        """The methods that take part in this call."""


class Method:
    """A way to steer, bound to one call. The loop calls its hooks, none of which does anything by default.

    Attributes:
        needs_loop (`bool`): whether it uses other hooks than [`around_forward`]; else the loop of `generate` is
            enough.
        values_texts (`bool`): whether [`values`] answers. The first method that does is the one whose values are
            reported.
        judges (`bool`): whether it decides which tokens are kept, by [`acting`], [`accepts`], [`propose`] and
            [`decide`]. One method may.
        eager (`bool`): whether it wants to see all candidates of each token, or only where one is not acceptable.
        most (`int`): the most candidates that it proposes, an ending token included.
        lookahead (`str`): how candidates are to be forwarded, or `"auto"`.
        last_token_apart (`bool`): whether the last token of a prompt has to be read by a forward of its own.
        back (`int`): how many tokens it may take back by [`rewrite`].
        follows (`bool`): whether [`undo`] brings its state back to that of an earlier token.
        rowwise (`tuple` of `str`): its attributes that have one entry a row: its state, which can be taken back.
    """

    needs_loop: bool = True
    values_texts: bool = False
    judges: bool = False
    eager: bool = False
    most: int = 1
    lookahead: str = "auto"
    last_token_apart: bool = False
    back: int = 0
    follows: bool = True
    rowwise: ClassVar[tuple[str, ...]] = ()

    def around_forward(self, reading: Reading) -> AbstractContextManager[Any]:  # noqa: ARG002
        """A context in which the forward that reads this is run. Called by the engine."""
        return nullcontext()

    def values(self, features: Tensor) -> Tensor:
        """Values `(...)` in (0, 1), or NaN, of texts whose last token has the features `(..., width)`."""
        raise NotImplementedError

    def prescribe(self, draw: Draw) -> None:
        """Put tokens in the place of natural samples: into `draw.tokens`, and their rows into `draw.forced`."""

    def acting(self, draw: Draw) -> Tensor:
        """Rows `(batch,)` in which a natural sample may be replaced now."""
        raise NotImplementedError

    def accepts(self, values: Tensor) -> Tensor:
        """Which natural samples of these values `(batch,)` are kept."""
        raise NotImplementedError

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        """Candidates of some rows `(n,)`, the natural sample first; `known` and `acting` are `(n,)`."""
        raise NotImplementedError

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        """Choose among candidates of values `(n, columns)`."""
        raise NotImplementedError

    def observe(self, moment: "Moment") -> None:
        """Take notice of a prompt, or of the token that each row has committed."""

    def record(self, moment: "Moment") -> Mapping[str, Tensor]:  # noqa: ARG002
        """What to add to the output's fields for this token, `(batch, ...)` each."""
        return {}

    def rewrite(self, moment: "Moment") -> Mapping[int, Tensor]:  # noqa: ARG002
        """Rows whose last tokens are to be others: from row to the tokens `(n,)` that take their place."""
        return {}

    def snapshot(self) -> Mapping[str, Tensor]:
        """The state of every row, as it is now."""
        return {name: getattr(self, name).clone() for name in self.rowwise}

    def undo(self, rows: Tensor, snapshot: Mapping[str, Tensor]) -> None:
        """Go back to an earlier state in these rows `(n,)`."""
        for name, before in snapshot.items():
            now = getattr(self, name).clone()
            now[rows] = before[rows]
            setattr(self, name, now)


@dataclass
class Moment:
    """Every row has committed a token, or its prompt was read.

    The loop makes one after each step, and gives it to every method: [`Method.observe`], [`Method.record`],
    [`Method.rewrite`].

    Args:
        step (`int`): number of new tokens; 0 is the prompt.
        feature (`torch.FloatTensor` of shape `(batch, width)`): of the last token of each row.
        live (`torch.BoolTensor` of shape `(batch,)`): rows whose token counts.
        unfinished (`torch.BoolTensor` of shape `(batch,)`): rows that go on.
        draw, outcome (*optional*): what the token was drawn from, and what came of it.
    """

    step: int
    feature: Tensor
    live: Tensor
    unfinished: Tensor
    draw: Draw | None = None
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.known: dict[int, Tensor] = {}  # values, by `id` of the method that has them

    def values_of(self, method: Method) -> Tensor:
        """Values `(batch,)` of the texts by a method, computed once; NaN in rows whose token does not count.

        Raises:
            ScoringError: if there is none for a row whose token counts.
        """
        if id(method) not in self.known:
            values = method.values(self.feature).masked_fill(~self.live, torch.nan)
            require_finite(values, self.live, max(self.step - 1, 0))
            self.known[id(method)] = values
        return self.known[id(method)]
