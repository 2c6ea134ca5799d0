"""The law of the texts that the filter commits with `rollback`, written down and enumerated. Nothing is drawn here.

In a step K candidates are drawn from the next-token law, each for itself. They are tried in order, and the first one
that is accepted is committed. If none is, the step is a dead end, and the row goes back. It takes its last token back:
that token is rejected at its place. There the candidates that were drawn and not tried yet are tried, then K new
ones, drawn from the law without the rejected tokens. What is tried and not accepted is rejected, too. If none is
accepted, one more token is taken back. Else the row catches up with K new candidates at each place, up to the place
of the dead end. A dead end on the way takes one more token back.

A search takes at most `2 * rollback` tokens back, and none that stands more than `rollback` places before the dead
end. One that fails leaves the row as it was, and the best candidate of the dead end is committed: all of them count
as rejected there. What is known of a place stays from one search to the next, until the row comes to it once more.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np


Text = tuple[int, ...]


class Place(NamedTuple):
    """A committed token, and what is known of its place.

    Args:
        token: it.
        left: candidates that were drawn after it.
        rejected: tokens that were tried there and not kept.
    """

    token: int
    left: tuple[int, ...] = ()
    rejected: frozenset[int] = frozenset()


Path = tuple[Place, ...]


class Rule(NamedTuple):
    """What the law depends on.

    Args:
        probabilities: the next-token law after each text.
        values: of each text; low is good.
        accept: with what probability a value is accepted, each time that it is tried.
        num_candidates, rollback: as in `ValueFilterConfig`.
    """

    probabilities: Mapping[Text, np.ndarray]
    values: Mapping[Text, float]
    accept: Callable[[float], float]
    num_candidates: int
    rollback: int


def hard(threshold: float) -> Callable[[float], float]:
    """`selection="first"`."""
    return lambda value: float(value < threshold)


def soft(threshold: float, beta: float) -> Callable[[float], float]:
    """`selection="soft"`."""
    odds = np.log(threshold / (1 - threshold))
    return lambda value: float(min(1.0, np.exp(-beta * (np.log(value / (1 - value)) - odds))))


def law(rule: Rule, length: int) -> dict[Text, float]:
    """P(text), of texts of `length` tokens."""
    search = Search(rule, length)
    paths: dict[Path, float] = {(): 1.0}
    for _ in range(length):
        paths = _mixed((mass, search.step(path)) for path, mass in paths.items())
    texts = dict.fromkeys(itertools.product(range(len(rule.probabilities[()])), repeat=length), 0.0)
    for path, mass in paths.items():
        texts[_text(path)] += mass
    return texts


def _mixed(parts) -> dict:
    """A mixture of laws, each with its weight."""
    mixture: dict = {}
    for weight, part in parts:
        for outcome, mass in part.items():
            mixture[outcome] = mixture.get(outcome, 0.0) + weight * mass
    return mixture


def _text(path: Path) -> Text:
    return tuple(place.token for place in path)


class Search:
    """Laws of what comes after a path: of paths, and of `None`, where there is none."""

    def __init__(self, rule: Rule, length: int):
        self.rule, self.length = rule, length
        self.fresh, self.back, self.caught_up = cache(self.fresh), cache(self.back), cache(self.caught_up)

    def kept(self, path: Path) -> Path:
        """The path without what no later search will ask for, so that there are fewer of them."""
        plain = len(path) if len(path) == self.length else max(len(path) - self.rule.rollback, 0)
        return tuple(Place(place.token) for place in path[:plain]) + path[plain:]

    def step(self, path: Path) -> dict[Path, float]:
        """An ordinary step."""
        return _mixed((mass, self.settled(path, drawn)) for drawn, mass in self.drawn(path, frozenset()))

    def settled(self, path: Path, drawn: tuple[int, ...]) -> dict[Path, float]:
        """The step with these candidates."""
        outcome = self.tried(path, drawn, frozenset())
        dead = outcome.pop(None, 0.0)
        if not dead:
            return outcome
        found = dict(self.back(path, len(path), 0))
        best = min(drawn, key=lambda token: self.rule.values[(*_text(path), token)])
        failed = {self.kept((*path, Place(best, (), frozenset(drawn)))): found.pop(None, 0.0)}
        return _mixed([(1.0, outcome), (dead, found), (dead, failed)])

    def drawn(self, path: Path, rejected: frozenset[int]) -> Iterator[tuple[tuple[int, ...], float]]:
        """All K candidates that can be drawn without rejected tokens, and with what probability."""
        law = self.rule.probabilities[_text(path)].copy()
        law[list(rejected)] = 0
        if not law.any():
            return
        law = law / law.sum()
        for candidates in itertools.product(np.flatnonzero(law).tolist(), repeat=self.rule.num_candidates):
            yield candidates, float(law[list(candidates)].prod())

    def tried(self, path: Path, candidates: tuple[int, ...], rejected: frozenset[int]) -> dict[Path | None, float]:
        """Try candidates in order."""
        outcome: dict[Path | None, float] = {}
        going = 1.0
        for column, token in enumerate(candidates):
            accepted = self.rule.accept(self.rule.values[(*_text(path), token)])
            refused = rejected.union(candidates[:column])
            left = tuple(each for each in candidates[column + 1 :] if each not in refused)
            after = self.kept((*path, Place(token, left, refused)))
            outcome[after] = outcome.get(after, 0.0) + going * accepted
            going *= 1 - accepted
        outcome[None] = going
        return {after: mass for after, mass in outcome.items() if mass}

    def fresh(self, path: Path, rejected: frozenset[int]) -> dict[Path | None, float]:
        """Draw new candidates, and try them."""
        outcome = _mixed((mass, self.tried(path, drawn, rejected)) for drawn, mass in self.drawn(path, rejected))
        return outcome or {None: 1.0}  # no token is left

    def back(self, path: Path, furthest: int, taken: int) -> dict[Path | None, float]:
        """Take one more token back, after `taken` of them."""
        most = self.rule.rollback
        if taken == 2 * most or len(path) <= max(furthest - most, 0):
            return {None: 1.0}
        *start, place = path
        before, rejected = tuple(start), place.rejected | {place.token}
        left = tuple(token for token in place.left if token not in rejected)
        outcome = self.tried(before, left, rejected)
        refused = outcome.pop(None, 0.0)
        outcome = _mixed([(1.0, outcome), (refused, self.fresh(before, rejected.union(left)))])
        return _mixed(
            (
                mass,
                self.back(before, furthest, taken + 1)
                if after is None
                else self.caught_up(after, furthest, taken + 1),
            )
            for after, mass in outcome.items()
        )

    def caught_up(self, path: Path, furthest: int, taken: int) -> dict[Path | None, float]:
        """Go on to the furthest place."""
        if len(path) > furthest:
            return {path: 1.0}
        return _mixed(
            (mass, self.back(path, furthest, taken) if after is None else self.caught_up(after, furthest, taken))
            for after, mass in self.fresh(path, frozenset()).items()
        )
