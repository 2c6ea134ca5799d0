"""What a steered `generate` returns beside the text, and how it is gathered step by step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
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
        dead_ends (`torch.BoolTensor` of shape `(batch, new_tokens)`, *optional*): with a filter, where no candidate
            was acceptable, and `fallback` has decided.
        taken_back_steps (`torch.LongTensor` of shape `(batch, n)`, *optional*): with `rollback`, where tokens were
            taken back, in order: numbers of new tokens before them; -1 where a row has fewer than `n`. Searches that
            have failed do not count.
        taken_back_tokens (`torch.LongTensor` of shape `(batch, n)`, *optional*): these tokens; -1 where there is none.
        taken_back_values (`torch.FloatTensor` of shape `(batch, n)`, *optional*): their values; NaN where there is
            none.
        judge_seconds (`float`, *optional*): with a judge of text, the time that it took in this call.
        candidates (`torch.LongTensor` of shape `(batch, new_tokens, K)`, *optional*): with `output_candidates`; -1
            where none was drawn. Where one of the most likely tokens is drawn (`selection="soft"` and
            `proposal="topk"`) K + 1: the natural sample, and the others.
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
    dead_ends: Tensor | None = None
    taken_back_steps: Tensor | None = None
    taken_back_tokens: Tensor | None = None
    taken_back_values: Tensor | None = None
    judge_seconds: float | None = None
    candidates: Tensor | None = None
    candidate_values: Tensor | None = None

    def __repr__(self) -> str:
        """What was done, in one line; the tensors are in the fields."""
        rows, length = self.sequences.shape
        parts = [f"{rows} row(s) of {length} tokens"]
        if self.interventions is not None:
            touched, steps = int(self.interventions.any(dim=1).sum()), int(self.interventions.sum())
            parts += [f"{touched} touched", f"{steps} intervention(s)"]
        if self.dead_ends is not None and bool(self.dead_ends.any()):
            parts.append(f"{int(self.dead_ends.sum())} dead end(s)")
        if self.taken_back_steps is not None:
            parts.append(f"{int((self.taken_back_steps >= 0).sum())} taken back")
        if self.abstained is not None:
            parts.append(f"{int(self.abstained.sum())} abstained")
        return f"{type(self).__name__}({', '.join(parts)}; fields: {', '.join(self.keys())})"


@dataclass
class Stops:
    """When and why rows were ended: `step` (`(batch,)`, -1 if not) and `value` (`(batch,)`, NaN if not).

    Methods and the loop call [`mark`]; the loop puts both tensors into the output.
    """

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

    def copy(self) -> "Stops":
        """The present state. The tensors are shared: nothing writes into them, [`mark`] and [`become`] get others."""
        return Stops(self.step, self.value)

    def become(self, other: "Stops") -> None:
        """Be as `other` is."""
        self.step, self.value = other.step, other.value


# Fields of the output that plain `generate` has: tuples of one entry a step. Ours are stacked along dimension 1.
_OF_GENERATE = ("scores", "logits", "attentions", "hidden_states")


class Record:
    """Collects what a call returns beside the text: for each field of the output a list with an entry for each step.

    The loop calls [`add`] in each step and [`fields`] at the end. The rewriting of tokens changes earlier entries.

    Args:
        config: of the call. It says whether anything is returned beside the text, and what of plain `generate`'s
            fields.
    """

    def __init__(self, config: GenerationConfig):
        self.wanted = bool(config.return_dict_in_generate)
        asked = {name: getattr(config, f"output_{name}") for name in _OF_GENERATE}
        self.names = [name for name, wanted in asked.items() if wanted and self.wanted]
        self.steps: dict[str, list[Any]] = {}

    def add(self, **fields: Any) -> None:
        """Add one entry to each of these fields: tensors of `(batch, ...)`, or tuples of such."""
        for name, entry in fields.items():
            if self.wanted and (name not in _OF_GENERATE or name in self.names) and entry is not None:
                self.steps.setdefault(name, []).append(entry)

    def rewrite(self, row: int, ago: int, **fields: Tensor) -> None:
        """Put other entries `(...)` into one row of an earlier step: 1 is the last step, 2 the one before."""
        for name, entry in fields.items():
            if name in self.steps:
                changed = self.steps[name][-ago] = self.steps[name][-ago].clone()
                changed[row] = entry.to(changed)

    def drop(self, count: int) -> None:
        """Forget the last steps."""
        for entries in self.steps.values():
            del entries[-count:]

    def rewrite_states(self, row: int, ago: int, states: tuple[Tensor, ...]) -> None:
        """The same for hidden states, `(1, width)` of each layer."""
        if "hidden_states" in self.steps:
            before = self.steps["hidden_states"][-ago]
            changed = self.steps["hidden_states"][-ago] = tuple(each.clone() for each in before)
            for mine, own in zip(changed, states, strict=True):
                mine[row] = own.to(mine)

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """The scores of all steps, for stopping criteria; `None` if they are not kept."""
        return tuple(self.steps.get("scores", ())) or None

    def fields(self) -> dict[str, Any]:
        """The output's fields."""
        return {
            name: tuple(steps) if name in _OF_GENERATE else torch.stack(steps, dim=1)
            for name, steps in self.steps.items()
        }
