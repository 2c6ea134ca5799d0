"""What a steered `generate` returns beside the text, and how it is gathered step by step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput


@dataclass(repr=False)
class ValueSteerDecoderOnlyOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """[`~transformers.generation.GenerateDecoderOnlyOutput`] with the record of the steering.

    Args:
        token_values (`torch.FloatTensor` of shape `(batch, new_tokens)`): value of each committed token, by the
            filter's head if there is a filter, else by the abstention's, else by the guidance module at its last
            refresh; NaN after a row's end.
        prompt_values (`torch.FloatTensor` of shape `(batch,)`): value of the prompt by the same head.
        interventions (`torch.BoolTensor` of shape `(batch, new_tokens)`): where the committed token is not the natural
            sample.
        candidates_evaluated (`torch.LongTensor` of shape `(batch, new_tokens)`): distinct candidates that were
            forwarded; 0 after a row's end.
        abstained (`torch.BoolTensor` of shape `(batch,)`): whether the row was ended by abstention or by
            `fallback="abstain"`.
        abstention_step (`torch.LongTensor` of shape `(batch,)`): number of new tokens at that moment, -1 if not.
        abstention_value (`torch.FloatTensor` of shape `(batch,)`): the value that decided it, NaN if not.
        guided (`torch.BoolTensor` of shape `(batch, new_tokens)`, *optional*): with guidance, whether the committed
            token was shown a bridge when it was read, and so the one after it was guided.
        candidates (`torch.LongTensor` of shape `(batch, new_tokens, K)`, *optional*): with `output_candidates`; -1
            where none was drawn.
        candidate_values (`torch.FloatTensor` of the same shape, *optional*): their values, NaN where not evaluated.
    """

    token_values: Tensor | None = None
    prompt_values: Tensor | None = None
    interventions: Tensor | None = None
    candidates_evaluated: Tensor | None = None
    abstained: Tensor | None = None
    abstention_step: Tensor | None = None
    abstention_value: Tensor | None = None
    guided: Tensor | None = None
    candidates: Tensor | None = None
    candidate_values: Tensor | None = None

    def __repr__(self) -> str:
        """What was done, in one line; the tensors are in the fields."""
        rows, length = self.sequences.shape
        parts = [f"{rows} row(s) of {length} tokens"]
        if self.interventions is not None:
            touched, steps = int(self.interventions.any(dim=1).sum()), int(self.interventions.sum())
            parts += [f"{touched} touched", f"{steps} intervention(s)"]
        if self.abstained is not None:
            parts.append(f"{int(self.abstained.sum())} abstained")
        return f"{type(self).__name__}({', '.join(parts)}; fields: {', '.join(self.keys())})"


@dataclass
class Stops:
    """When and why rows were ended: `step` (`(batch,)`, -1 if not) and `value` (`(batch,)`, NaN if not)."""

    step: Tensor
    value: Tensor

    @classmethod
    def none(cls, batch_size: int, device: torch.device) -> "Stops":
        step = torch.full((batch_size,), -1, device=device)
        return cls(step, torch.full((batch_size,), torch.nan, device=device))

    def mark(self, rows: Tensor, step: int, values: Tensor) -> None:
        """Note that `rows` (bool, `(batch,)`) end after `step` new tokens because of `values`."""
        self.step = self.step.masked_fill(rows, step)
        self.value = torch.where(rows, values, self.value)


@dataclass
class Record:
    """One list entry a step; only what the caller asked for."""

    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    attentions: list[tuple[Tensor, ...]] = field(default_factory=list)
    hidden_states: list[tuple[Tensor, ...]] = field(default_factory=list)
    token_values: list[Tensor] = field(default_factory=list)
    interventions: list[Tensor] = field(default_factory=list)
    candidates_evaluated: list[Tensor] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    candidates: list[Tensor] = field(default_factory=list)
    candidate_values: list[Tensor] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """The output's fields: plain `generate`'s as tuples of one entry a step, ours stacked along dimension 1."""
        as_tuples = ("scores", "logits", "attentions", "hidden_states")
        recorded = {name: steps for name, steps in vars(self).items() if steps}
        return {
            name: tuple(steps) if name in as_tuples else torch.stack(steps, dim=1) for name, steps in recorded.items()
        }
