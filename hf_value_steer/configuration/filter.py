"""`ValueFilterConfig`: value-filtered decoding as a method of `generate(..., value_steer=...)`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from hf_value_steer.choices import Evaluation, Fallback, Selection
from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.configuration.operating_point import DEFAULTS, check_choices


@dataclass(frozen=True, kw_only=True)
class ValueFilterConfig(SteeringConfig):
    r"""Value-filtered decoding (arXiv 2605.14746): commit the first of K candidates whose value is acceptable.

    Takes the arguments of [`SteeringConfig`] and:

    `value_head` may be a judge of text, too: a [`TextJudge`], a function from a list of texts to numbers in [0, 1], or
    a name such as `"lexicon:words.txt"`. It is asked about candidates before they are forwarded.

    `num_candidates`, `rollback`, `selection`, `beta`, `threshold` and `alpha` follow the head's operating point where
    they are left out ([`ValueHeadConfig`]).

    Args:
        num_candidates (`int`, *optional*): K, the natural sample included; at most 1,024. By default 8.
        proposal (`str`): `"sample"` draws alternatives independently from the processed distribution, `"topk"` takes
            the most likely tokens. Greedy decoding always takes the most likely ones.
        evaluation (`str`): `"lazy"` forwards alternatives for rows that reject the natural sample; `"eager"` forwards
            all candidates in one pass. Both commit the same tokens (in half precision, up to rounding). `"auto"` times
            some steps of both at the first call of its kind, begins with what is cheaper if 5 % of the natural samples
            are rejected, and changes to eager steps where a text rejects so many that they are cheaper.
        rollback (`int`, *optional*): at a dead end, where no candidate is acceptable, up to so many tokens are taken
            back, and another way is looked for: candidates that were drawn at that place before, then new ones, drawn
            without those that were rejected; and so on from there. A search takes back at most twice so many tokens in
            all. If it finds no way, the text stays as it was, and `fallback` decides. A streamer is so many tokens
            behind. By default 0.
        selection (`str`, *optional*): `"first"`, the default, commits the first candidate that is acceptable. `"soft"`
            commits the first one that a draw accepts: for certain what is acceptable, else with probability
            `exp(-beta * excess)`. The excess is how far the log odds of a value are beyond those of the threshold. So
            fewer tokens are replaced, the worst ones most often. With `proposal="topk"` it draws one of the K most
            likely tokens, by `probability * exp(-beta * odds)`; the odds are the log odds of not being acceptable, and
            no threshold counts (as FUDGE, arXiv 2104.05218). Greedy search takes the largest of these.
        beta (`float`, *optional*): of `"soft"`, above 0; the larger it is, the nearer to `"first"`. By default 1.
        fallback (`str`): if no candidate is acceptable: `"argmin"` commits the most acceptable one, `"args"` the one
            with the lowest `u - prob_weight * probability` (ARGS, arXiv 2402.01694; `u` = undesirability), and
            `"abstain"` ends the row.
        prob_weight (`float`): `w` of `"args"`, not negative.
        max_interventions (`int`, *optional*): rows are left alone after so many interventions.
        output_candidates (`bool`): return the candidates and their values.
        lookahead (`str`): how candidates are forwarded: `"shared_prefix"` (the prefix is read once for all of them,
            without a mask), `"masked"` (along the query dimension, under a 4-D mask), `"expanded"` (along the batch
            dimension, any model and cache), or with `"auto"` the best that was verified for the model. Where the step
            is compiled, so is the look-ahead with `"auto"` and `"masked"`.
        seed (`int`, *optional*): seed of the alternatives; by default it follows the global generator's state.
    """

    method: ClassVar[str] = "filter"
    takes_judges: ClassVar[bool] = True

    # Types of a config that is settled; before, `None` is what the head may say.
    num_candidates: int = None  # type: ignore[assignment]
    proposal: Literal["sample", "topk"] = "sample"
    evaluation: Evaluation = "lazy"
    selection: Selection = None  # type: ignore[assignment]
    beta: float = None  # type: ignore[assignment]
    fallback: Fallback = "argmin"
    prob_weight: float = 1.0
    rollback: int = None  # type: ignore[assignment]
    max_interventions: int | None = None
    output_candidates: bool = False
    lookahead: Literal["auto", "shared_prefix", "masked", "expanded"] = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(**{name: getattr(self, name) for name in DEFAULTS})
        if type(self.prob_weight) not in (int, float) or not 0 <= self.prob_weight < math.inf:
            raise ValueError(f"`prob_weight` has to be a finite number of at least 0, got {self.prob_weight!r}.")
        if self.reweighs and (self.fallback != "argmin" or self.rollback):
            raise ValueError(
                'With `selection="soft"` and `proposal="topk"` no step is a dead end: leave out `fallback`, and pass '
                "`rollback=0`."
            )
        if self.reweighs and self.alpha is not None:
            raise ValueError('With `selection="soft"` and `proposal="topk"` no threshold counts: leave out `alpha`.')
        if self.max_interventions is not None:
            self._check_integer("max_interventions", 0)
        if self.seed is not None:
            self._check_integer("seed", 0)

    @property
    def reweighs(self) -> bool:
        """Whether a most likely token is drawn by its value: no threshold counts, and no step is a dead end."""
        return self.selection == "soft" and self.proposal == "topk"

    def settled(self, point: Mapping[str, Any] | None) -> "ValueFilterConfig":
        """This config with what it leaves open: as the operating point of the head has it, else by default."""
        point = {**DEFAULTS, **(point or {})}
        selected = replace(self, selection=self.selection or point["selection"])
        if self.threshold is not None or self.alpha is not None or selected.reweighs:
            point.pop("alpha", None)
        return replace(self, **{name: choice for name, choice in point.items() if getattr(self, name) is None})
