"""What `calibrate` is told."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt

from hf_value_steer.arguments.base import Arguments
from hf_value_steer.arguments.kinds import Candidates, Probability, Rollback, Share
from hf_value_steer.choices import HeadMethod, PromiseMode, Selection
from hf_value_steer.configuration.operating_point import DEFAULTS


@dataclass(kw_only=True)
class CalibrateArguments(Arguments):
    """Which promise, and on what."""

    collection: str = field(metadata={"help": "folder of a labelled collection"})
    value_head: str = field(metadata={"help": "folder of the head; calibration.json and its threshold are written"})
    judge: str | None = field(
        default=None, metadata={"help": "the judge that says which generations are safe, or correct"}
    )
    attributes: list[str] = field(
        default_factory=list,
        metadata={"help": "instead of a judge, as for `train`: safe is what each attribute's judge finds safe"},
    )
    method: HeadMethod = field(default="filter", metadata={"help": "what the head is for"})
    mode: PromiseMode = field(default="marginal", metadata={"help": "kind of promise; selective is for abstain only"})
    delta: Share | None = field(
        default=None, metadata={"help": "how often a promise with confidence may fail, in (0, 1)"}
    )
    alpha: Probability | None = field(
        default=None,
        metadata={
            "help": "make the threshold of this promise the default: the share of safe texts that a filter may touch; "
            "for abstain of all texts that may be ended or, in mode selective, of the answers that may be wrong"
        },
    )
    num_candidates: Candidates | None = field(
        default=None, metadata={"help": "the head's operating point: candidates of its filter"}
    )
    rollback: Rollback | None = field(
        default=None, metadata={"help": "the head's operating point: tokens that its filter may take back"}
    )
    selection: Selection | None = field(
        default=None, metadata={"help": "the head's operating point: first acceptable candidate, or a soft choice"}
    )
    beta: Annotated[float, Gt(0)] | None = field(
        default=None, metadata={"help": "the head's operating point: sharpness of a soft choice"}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "column of the prompts: thresholds for each group"}
    )
    seed: Annotated[int, Ge(0)] = field(
        default=0, metadata={"help": "seed of the choice of one generation for each prompt"}
    )

    def operating_point(self) -> dict[str, Any]:
        """What is said of how a filter uses the head."""
        return {name: choice for name in DEFAULTS if (choice := getattr(self, name)) is not None}

    def check(self) -> None:
        if self.method != "filter" and (said := ", ".join(self.operating_point())):
            raise ValueError(f"`{said}` is for a filter, this head is calibrated for {self.method!r}.")
        if (self.judge is None) != bool(self.attributes):
            raise ValueError("`judge` says which generations are safe, or `attributes` do: pass one of them.")
