"""2,000 decisions about candidates, recorded before decisions were taken in one place.

`python -m tests.decisions` records them anew with what is installed: only for a change that is meant to change them.

A decision is one new token. Its model is a *parrot*, whose feature says which token it read, and its head a table of
values by token; scores come from a processor. So candidates, values, ties, bans, dead ends and NaN are chosen freely,
and still go through the whole of `generate`, of a logits processor, or of vLLM's filter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from hf_value_steer import ScoringError, ValueFilterConfig, ValueHead, ValueHeadConfig, enable_value_steer


FILE = Path(__file__).parent / "golden" / "decisions.safetensors"
VOCABULARY, EOS, PROMPT, ROWS = 128, 0, 1, 80
COUNTS = (1, 2, 4, 8)
NAMES = ("candidates", "tokens", "ended")


class TableHead(ValueHead):
    """A head whose value of a feature is that of the token which the parrot read."""

    def __init__(self, polarity: str, table: Tensor):
        super().__init__(ValueHeadConfig(hidden_size=VOCABULARY, architecture="linear", polarity=polarity))
        self.table = table

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Any:
        output = super().forward(hidden_states, labels)
        output.value = self.table[hidden_states.argmax(dim=-1)]
        return output


@dataclass
class Scores(LogitsProcessor):
    """Puts `(rows, vocab)` scores in place of the model's."""

    scores: Tensor

    def __call__(self, _input_ids: Tensor, _scores: Tensor) -> Tensor:
        return self.scores.clone()


@dataclass(frozen=True)
class Group:
    """Decisions of one config, a row each.

    Args:
        index (`int`): which group.
        config (`dict`): arguments of [`ValueFilterConfig`], but for head and thresholds.
        polarity (`str`): of the head.
        sampled (`bool`): whether the natural samples are drawn.
        scores (`torch.FloatTensor` of shape `(rows, vocab)`): `-inf` is forbidden.
        table (`torch.FloatTensor` of shape `(vocab,)`): value of each token, NaN where the head has none.
        thresholds (`torch.FloatTensor` of shape `(rows,)`).
    """

    index: int
    config: dict[str, Any]
    polarity: str
    sampled: bool
    scores: Tensor
    table: Tensor
    thresholds: Tensor

    @property
    def head(self) -> TableHead:
        return TableHead(self.polarity, self.table)


def groups() -> list[Group]:
    """All of them: 24 of 80 rows, and 80 of one row in which a NaN is met."""
    methods = [
        (polarity, fallback, evaluation, sampled)
        for polarity in ("undesirable", "desirable")
        for fallback in ("argmin", "args", "abstain")
        for evaluation in ("lazy", "eager")
        for sampled in (False, True)
    ]
    whole = [_group(index, ROWS, *method) for index, method in enumerate(methods)]
    return whole + [_broken(len(whole) + index, *methods[index % len(methods)]) for index in range(80)]


def _group(index: int, rows: int, polarity: str, fallback: str, evaluation: str, sampled: bool) -> Group:
    generator = torch.Generator().manual_seed(index)
    config = {
        "num_candidates": COUNTS[index % len(COUNTS)] if rows > 1 else 4,
        "evaluation": evaluation,
        "fallback": fallback,
        "prob_weight": float(torch.rand(1, generator=generator) * 2),
        "seed": index,
    }
    if rows > 1 and index % 8 == 7:  # the filter is not to act
        config |= {"min_new_tokens": 1} if index % 16 == 7 else {"max_interventions": 0}
    # Coarse numbers, so that scores and values tie; few tokens are permitted, so that candidates repeat and run out.
    scores = (torch.randn(rows, VOCABULARY, generator=generator) * 3).round() / 2
    places = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=-1)
    scores.masked_fill_(places >= torch.randint(1, 13, (rows, 1), generator=generator), -torch.inf)
    scores[::2, EOS] = -3.0  # in every other row EOS is permitted
    scores[1::2, EOS] = -torch.inf
    scores[1::2, PROMPT].clamp_(min=-3.0)
    table = (torch.rand(VOCABULARY, generator=generator) * 20).round() / 20
    table = table.clamp(0.01, 0.99)
    thresholds = (torch.randint(0, 20, (rows,), generator=generator) + 0.5) / 20
    return Group(index, config, polarity, sampled, scores, table, thresholds)


def _broken(index: int, polarity: str, fallback: str, evaluation: str, sampled: bool) -> Group:
    """One row with a NaN among its candidates, the natural sample of which is not acceptable."""
    group = _group(index, 1, polarity, fallback, evaluation, sampled)
    group.table[torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(index)) < 0.6] = torch.nan
    group.table[[EOS, PROMPT]] = 0.5  # only `generate` looks at the prompt, and at the EOS that a fallback puts in
    group.thresholds[:] = 0.001 if polarity == "undesirable" else 0.999
    return group


def parrot() -> LlamaForCausalLM:
    """A model whose feature of a token is that token, one-hot."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": VOCABULARY, "intermediate_size": 4, "num_attention_heads": 2}
    tokens = {"eos_token_id": EOS, "pad_token_id": 2, "bos_token_id": 1}
    config = LlamaConfig(**sizes, **tokens, num_hidden_layers=1, max_position_embeddings=16)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return enable_value_steer(model)


def feature(tokens: Tensor) -> Tensor:
    """What the parrot says of tokens `(...)`, `(..., vocab)`."""
    return torch.nn.functional.one_hot(tokens, VOCABULARY).float()


def decide_in_generate(model: LlamaForCausalLM, group: Group) -> tuple[Tensor, Tensor, Tensor] | str:
    """Candidates `(rows, K)`, the committed token `(rows,)`, and whether the row was ended by the fallback."""
    config = ValueFilterConfig(
        value_head=group.head, threshold=group.thresholds.tolist(), output_candidates=True, **group.config
    )
    arguments = {"max_new_tokens": 1, "do_sample": group.sampled, "return_dict_in_generate": True}
    torch.manual_seed(group.index)
    try:
        out = model.generate(
            torch.full((len(group.scores), 2), PROMPT), logits_processor=[Scores(group.scores)], value_steer=config,
            **arguments,
        )  # fmt: skip
    except ScoringError as error:
        return str(error)
    return out.candidates[:, 0], out.sequences[:, -1], out.abstained.long()


def recorded() -> Iterator[tuple[Group, tuple[Tensor, Tensor, Tensor] | None]]:
    """Each group with its candidates, committed tokens and ends as they were recorded; `None` for a NaN."""
    kept = load_file(FILE)
    for group in groups():
        found = [kept[f"{name}.{group.index}"].long() for name in NAMES if f"{name}.{group.index}" in kept]
        yield group, tuple(found) or None  # type: ignore[misc]


def main() -> None:
    """Record."""
    model, kept, broken = parrot(), {}, 0
    for group in groups():
        outcome = decide_in_generate(model, group)
        if isinstance(outcome, str):
            broken += 1
            continue
        for name, each in zip(NAMES, outcome, strict=True):
            kept[f"{name}.{group.index}"] = each.to(torch.int16, memory_format=torch.contiguous_format)
    FILE.parent.mkdir(exist_ok=True)
    save_file(kept, FILE)
    ended = sum(int(each.sum()) for name, each in kept.items() if name.startswith("ended"))
    changed = sum(int((kept[f"candidates.{i}"][:, 0] != kept[f"tokens.{i}"]).sum()) for i in range(24))
    rows = sum(len(each) for name, each in kept.items() if name.startswith("tokens"))
    print(f"{rows + broken} decisions: {changed} replaced, {ended} ended, {broken} stopped by a NaN")  # noqa: T201


if __name__ == "__main__":
    main()
