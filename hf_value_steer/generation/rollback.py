"""Going back: the search for another way where no candidate of a place is acceptable."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.history import Past
from hf_value_steer.generation.state import Draw, State, TakenBack
from hf_value_steer.generation.trail import Scene, Trail


BUDGET = 2  # times `rollback`: the most tokens that a search takes back


@dataclass
class Place:
    """What is known of the candidates of a place, with the text before it as it is.

    Args:
        visits (`int`): how often a search has asked for candidates here, whatever the text before.
        left (`list` of `int`, *optional*): those that were drawn and not tried; `None` if a step has drawn them.
        rejected (`list` of `int`): those that were tried and not kept.
    """

    visits: int = 0
    left: list[int] | None = None
    rejected: list[int] = field(default_factory=list)


class Rollback:
    """Looks for another way in rows that have come to a dead end. The loop calls it after such a step.

    The last token of the row is taken back, and counts as rejected at its place. There the next acceptable candidate
    is committed: of those that were drawn before, in order, then of K new ones, drawn without the rejected ones. From
    there the row goes on by itself until it has caught up. At another dead end one more token is taken back. No token
    is taken back that stands more than `back` tokens before the furthest place, and one search takes back at most
    `BUDGET * back`. A search that fails leaves no trace: the row has the text that it had.

    Args:
        scene: of the call.
        back (`int`): how many tokens before the dead end may be taken back.
        rows (`int`): of the batch.
    """

    def __init__(self, scene: Scene, back: int, rows: int):
        self.scene, self.back = scene, back
        self.places: list[dict[int, Place]] = [{} for _ in range(rows)]
        self.taken: list[list[TakenBack]] = [[] for _ in range(rows)]
        self.asked_again = False

    def dead_ends(self) -> list[int]:
        """The rows in which the last step has found no acceptable candidate."""
        outcome = self.scene.history.pasts[-1].moment.outcome
        assert outcome is not None and outcome.room is not None
        found: list[int] = outcome.room.dead_ends.nonzero().flatten().tolist()
        return found

    def __call__(self, row: int, input_ids: Tensor, state: State) -> tuple[int, Tensor, State] | None:
        """Look for another way in this row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), state: the text and what it has left.

        Returns:
            How many of the last tokens are others now, the text, and the state after it; `None` if there is no way.
        """
        if not self.asked_again:
            self._ask_again()
        trail = Trail(self.scene, row, input_ids, state)
        places, taken = copy.deepcopy(self.places[row]), list[TakenBack]()
        with self.scene.engine.adapters.reading(torch.tensor([row]), 1):
            found = self._search(trail, places, taken)
        if not found:
            trail.leave()
            for step, place in places.items():
                self.places[row].setdefault(step, Place()).visits = place.visits
            return None
        furthest = trail.place - 1
        self.places[row] = {step: place for step, place in places.items() if step > furthest - self.back}
        self.taken[row] += taken
        state, changed = trail.keep(), len(trail.written)
        moments = [past.moment for past in self.scene.history.pasts][-changed:]
        for method in self.scene.history.methods:
            method.rewritten(row, moments, taken)
        return changed, trail.input_ids, state

    def totals(self) -> dict[str, Tensor]:
        """What was taken back, in the order in which it was, `(batch, n)` each."""
        most, device = max(map(len, self.taken)), self.scene.history.stops.step.device
        shape = (len(self.taken), most)
        steps, tokens = (torch.full(shape, -1, device=device) for _ in range(2))
        values = torch.full(shape, torch.nan, device=device)
        for row, taken in enumerate(self.taken):
            for place, each in enumerate(taken):
                steps[row, place], tokens[row, place], values[row, place] = each.step, each.token, each.value
        return {"taken_back_steps": steps, "taken_back_tokens": tokens, "taken_back_values": values}

    def _ask_again(self) -> None:
        """Raise an `UnsupportedError` if processors answer otherwise about an earlier text, or about one again."""
        draws = [draw for past in list(self.scene.history.pasts)[-2:] if (draw := past.moment.draw) is not None]
        self.asked_again = len(draws) > 1  # there is no earlier text before the second token
        for draw in draws:
            _, scores = self.scene.scores(draw.input_ids, draw.logits.clone())
            if not bool((scores == draw.scores).all()):
                names = ", ".join(type(each).__name__ for each in self.scene.scores.processors)
                raise UnsupportedError(
                    f"Tokens cannot be taken back: of the logits processors ({names}) one remembers what it was asked "
                    "before. Pass `rollback=0`."
                )

    def _search(self, trail: Trail, places: dict[int, Place], taken: list[TakenBack]) -> bool:
        trail.take_back()
        furthest = trail.place
        while len(taken) < BUDGET * self.back and trail.place > max(furthest - self.back, 0):
            past = trail.take_back()
            draw, outcome = past.moment.draw, past.moment.outcome
            assert draw is not None and outcome is not None
            taken.append(TakenBack(draw.step, int(outcome.tokens), float(outcome.values)))
            if not bool(trail.judge.acting(draw) & draw.live & ~draw.forced):
                return False
            place = self._come_back(trail, places, past)
            if self._go_on(trail, place, draw, outcome.evaluated) and self._catch_up(trail, places, furthest):
                return True
        return False

    def _come_back(self, trail: Trail, places: dict[int, Place], past: Past) -> Place:
        """The place of the token that was taken back, which is rejected there."""
        draw, outcome = past.moment.draw, past.moment.outcome
        assert draw is not None and outcome is not None
        place = places.setdefault(draw.step, Place())
        if place.left is None:
            everywhere = torch.ones_like(draw.live)
            candidates = trail.judge.propose(draw, torch.zeros_like(draw.tokens), everywhere, everywhere)
            drawn = _tokens(candidates.tokens[:, : candidates.drawn.shape[1]])
            room = outcome.room
            column = 0 if room is None else len(drawn) if bool(room.dead_ends) else int(room.columns)
            place.left, place.rejected = drawn[column + 1 :], drawn[:column]
        place.rejected.append(int(outcome.tokens))
        return place

    def _go_on(self, trail: Trail, place: Place, draw: Draw, evaluated: Tensor) -> bool:
        """Commit another candidate where a token was taken back."""
        natural = draw.tokens
        for candidates in self._offers(trail, place, draw):
            offered = torch.tensor([candidates], device=natural.device)
            asked = replace(draw, tokens=offered[:, 0], candidates=offered, visit=place.visits)
            if self._take(trail, place, asked, natural, evaluated):
                return True
            evaluated = evaluated + len(set(candidates))
        return False

    def _offers(self, trail: Trail, place: Place, draw: Draw) -> Iterator[list[int]]:
        """Candidates that were drawn before, then new ones."""
        left = [token for token in place.left or [] if token not in place.rejected]
        if left:
            place.visits += 1
            yield left
        scores = draw.scores.clone()
        scores[:, place.rejected] = -torch.inf
        if bool((scores > -torch.inf).any()):
            place.visits += 1
            yield _tokens(trail.judge.visit(replace(draw, scores=scores, visit=place.visits)))

    def _take(self, trail: Trail, place: Place, draw: Draw, natural: Tensor, evaluated: Tensor) -> bool:
        """Try the candidates of `draw`, and note at the place what has become of them."""
        assert draw.candidates is not None
        tokens = _tokens(draw.candidates)
        found = trail.take(draw, natural, evaluated)
        column = trail.column if found else len(tokens)
        place.rejected, place.left = place.rejected + tokens[:column], tokens[column + 1 :]
        return found

    def _catch_up(self, trail: Trail, places: dict[int, Place], furthest: int) -> bool:
        """Go on to the furthest place, and commit a token there; `False` at a dead end."""
        while trail.place <= furthest:
            if self.scene.pad is not None and not trail.goes_on:
                trail.fill()
                continue
            draw, place = trail.draw(), places.setdefault(trail.place, Place())
            place.visits, place.left, place.rejected = place.visits + 1, [], []
            if not bool((draw.scores > -torch.inf).any()):
                return False
            draw.visit = place.visits
            draw.candidates = trail.judge.visit(draw)
            draw.tokens = draw.candidates[:, 0]
            trail.prescribe(draw)
            natural, nothing = draw.tokens, torch.zeros_like(draw.tokens)
            if bool(draw.forced):
                draw.candidates = None
                if not trail.take(draw, natural, nothing):
                    return False
            elif not self._take(trail, place, draw, natural, nothing):
                return False
        return True


def _tokens(candidates: Tensor) -> list[int]:
    """The candidates of one row, in order."""
    return [token for token in candidates[0].tolist() if token >= 0]
