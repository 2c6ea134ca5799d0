"""Going back without a cache, without a batch, one candidate at a time: what `rollback` has to do, written down again.

It shares with the library the random numbers, as the oracle that it extends does.
"""

from typing import Any

import torch

from hf_value_steer.generation.candidates import another_key, random_key, uniforms
from tests.oracle import Oracle


class Row:
    """The text of one row, and what is known of each of its new tokens."""

    def __init__(self, number: int, prompt: list[int], padding: int):
        self.number, self.prompt, self.padding = number, prompt, padding
        self.tokens: list[int] = []
        self.values: list[float] = []
        self.natural: list[int] = []
        self.left: list[list[int]] = []
        self.rejected: list[list[int]] = []
        self.scores: list[torch.Tensor] = []
        self.visits: dict[int, int] = {}
        self.taken: list[tuple[int, int, float]] = []
        self.first_dead_end: int | None = None
        self.ended = False

    def copy(self) -> "Row":
        one = Row(self.number, self.prompt, self.padding)
        for name, entry in vars(self).items():
            copied = (
                [list(each) if isinstance(each, list) else each for each in entry]
                if isinstance(entry, list)
                else entry
            )
            setattr(one, name, dict(copied) if isinstance(copied, dict) else copied)
        return one

    def put(self, token: int, value: float, natural: int, left: list[int], rejected: list[int], scores: Any) -> None:
        for name, entry in (
            ("tokens", token), ("values", value), ("natural", natural), ("left", left), ("rejected", rejected),
            ("scores", scores),
        ):  # fmt: skip
            getattr(self, name).append(entry)

    def pop(self) -> tuple[int, float, int, list[int], list[int], Any]:
        names = ("tokens", "values", "natural", "left", "rejected", "scores")
        return tuple(getattr(self, name).pop() for name in names)  # type: ignore[return-value]

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    @property
    def interventions(self) -> int:
        return sum(token != natural for token, natural in zip(self.tokens, self.natural, strict=True))


class GoingBack(Oracle):
    """The filter with `rollback`. Counts what its searches came across, in `seen`."""

    def __init__(self, config: Any):
        super().__init__(config)
        counted = ("found", "failed", "deep", "while catching up", "ended", "budget", "drawn again")
        self.seen = dict.fromkeys((*counted, "two rows in one step"), 0)

    def visit_key(self, row: Row, place: int) -> int:
        row.visits[place] = row.visits.get(place, 0) + 1
        return row.visits[place]

    def numbers(self, row: Row, place: int, count: int, visit: int, key: bytes | None = None) -> list[float]:
        return uniforms(key or self.key, [row.number], place, count, visit)[0].tolist()

    def processed(self, row: Row) -> torch.Tensor:
        ids = torch.tensor([[0] * row.padding + row.text])
        logits = self.model(torch.tensor([row.text]), use_cache=False).logits[:, -1]
        rows = len(self.rows)  # some processors know each row's encoder input by its number
        return self.processors(ids.expand(rows, -1), logits.expand(rows, -1))[row.number]

    def ends(self, row: Row) -> bool:
        return bool(self.criteria(torch.tensor([[0] * row.padding + row.text]), None)[0])

    def draw(self, scores: torch.Tensor, numbers: list[float]) -> list[int]:
        drawn = []
        probabilities = scores.double().softmax(-1).tolist()
        for number in numbers:
            total = 0.0
            for token, probability in enumerate(probabilities):
                total += probability
                if total > number:
                    drawn.append(token)
                    break
        return drawn

    def fresh(self, row: Row, scores: torch.Tensor, place: int, visit: int) -> list[int]:
        """The natural sample of a visit, and its alternatives."""
        count, config = self.config.num_candidates, self.config
        order = sorted(range(len(scores)), key=lambda token: -scores[token].item())
        likely = [token for token in order if scores[token] > -torch.inf]
        if not self.draws:
            return likely[:count]
        if config.proposal == "sample":
            return self.draw(scores, self.numbers(row, place, count, visit))
        [natural] = self.draw(scores, self.numbers(row, place, 1, visit))
        return [natural, *[token for token in likely if token != natural][: count - 1]]

    def acting(self, row: Row) -> bool:
        most = self.config.max_interventions
        return len(row.tokens) >= self.config.min_new_tokens and (most is None or row.interventions < most)

    def first(self, row: Row, candidates: list[int], visit: int) -> tuple[int, float] | None:
        """The first candidate that is accepted: its column and value."""
        place = len(row.tokens)
        luck = self.numbers(row, place, len(candidates) + 1, visit, another_key(self.key))
        for column, (token, own) in enumerate(zip(candidates, luck, strict=False)):
            value = self.value(self.model, [*row.text, token], len(row.prompt))
            if self.accepts(value, own):
                return column, value
        return None

    def try_some(
        self,
        row: Row,
        candidates: list[int],
        natural: int | None,
        rejected: list[int],
        scores: torch.Tensor,
        visit: int,
    ) -> bool:
        found = self.first(row, candidates, visit)
        if found is None:
            rejected += candidates
            return False
        column, value = found
        natural = candidates[0] if natural is None else natural
        row.put(candidates[column], value, natural, candidates[column + 1 :], rejected + candidates[:column], scores)
        return True

    def catch_up(self, row: Row, furthest: int) -> bool:
        while len(row.tokens) <= furthest:
            if self.ends(row) and len(row.tokens):
                row.ended = True
                return True
            place, scores = len(row.tokens), self.processed(row)
            visit = self.visit_key(row, place)
            candidates = self.fresh(row, scores, place, visit)
            if not self.acting(row):
                token = candidates[0]
                row.put(token, self.value(self.model, [*row.text, token], len(row.prompt)), token, [], [], scores)
            elif not self.try_some(row, candidates, None, [], scores, visit):
                self.seen["while catching up"] += 1
                return False
        row.ended = self.ends(row)
        return True

    def search(self, before: Row) -> Row | None:
        """Another way for a row that has come to a dead end; its fallback is not part of it yet."""
        row, furthest, taken = before.copy(), len(before.tokens), 0
        while taken < 2 * self.config.rollback and len(row.tokens) > max(furthest - self.config.rollback, 0):
            token, value, natural, left, rejected, scores = row.pop()
            taken += 1
            self.seen["drawn again"] += token in rejected
            row.taken.append((len(row.tokens), token, value))
            if not self.acting(row):
                break
            rejected = [*rejected, token]
            place = len(row.tokens)
            left = [each for each in left if each not in rejected]
            gone_on = bool(left) and self.try_some(row, left, natural, rejected, scores, self.visit_key(row, place))
            if not gone_on:
                masked = scores.clone()
                masked[rejected] = -torch.inf
                if bool((masked > -torch.inf).any()):
                    visit = self.visit_key(row, place)
                    offered = self.fresh(row, masked, place, visit)
                    gone_on = self.try_some(row, offered, natural, rejected, scores, visit)
            if gone_on and self.catch_up(row, furthest):
                self.seen["found"] += 1
                self.seen["deep"] += taken > 2
                self.seen["ended"] += row.ended and len(row.tokens) <= furthest
                return row
        self.seen["failed"] += 1
        self.seen["budget"] += taken == 2 * self.config.rollback
        before.visits = row.visits
        return None

    def __call__(
        self, model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        self.model, self.processors, self.criteria = model, logits_processor, stopping_criteria
        self.draws, self.key = generation_config.do_sample, random_key(input_ids.device, self.config.seed)
        mask = model_kwargs["attention_mask"]
        starts = [0] * len(input_ids) if mask is None else mask.argmax(dim=1).tolist()
        self.rows = [Row(i, ids[s:].tolist(), s) for i, (ids, s) in enumerate(zip(input_ids, starts, strict=True))]
        step = 0
        while not all(row.ended for row in self.rows):
            going = [row for row in self.rows if not row.ended]
            scores = torch.stack(
                [torch.zeros(model.config.vocab_size) if row.ended else self.processed(row) for row in self.rows]
            )
            natural = scores.argmax(-1)
            if self.draws:
                natural = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            dead = 0
            for row in going:
                found = self.step(row, scores[row.number], int(natural[row.number]), step)
                dead += found
            self.seen["two rows in one step"] += dead > 1
            step += 1
        length = max(len(row.tokens) for row in self.rows)
        texts = [[0] * row.padding + row.text + [0] * (length - len(row.tokens)) for row in self.rows]
        return torch.tensor(texts)

    def step(self, row: Row, scores: torch.Tensor, natural: int, step: int) -> bool:
        """An ordinary step of one row; whether it went back."""
        config = self.config
        uniform = uniforms(self.key, [row.number], step, config.num_candidates - 1)[0]
        others = self.alternatives(scores, natural, uniform, self.draws)
        candidates = [natural, *others]
        if not self.acting(row):
            row.put(natural, self.value(self.model, [*row.text, natural], len(row.prompt)), natural, [], [], scores)
            row.ended = self.ends(row)
            return False
        if self.try_some(row, candidates, natural, [], scores, 0):
            row.ended = self.ends(row)
            return False
        if row.first_dead_end is None:
            row.first_dead_end = step
        other = self.search(row) if config.rollback else None
        if other is not None:
            self.rows[row.number] = other
            return True
        luck = self.numbers(row, step, config.num_candidates + 1, 0, another_key(self.key))
        token, value = self.commit(self.model, row.text, len(row.prompt), scores, candidates, luck)
        row.put(token, value, natural, [], candidates, scores)
        row.ended = self.ends(row)
        return False
