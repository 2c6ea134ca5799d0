"""What `calibrate` is told."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from hf_value_steer.arguments.base import Arguments
from hf_value_steer.arguments.kinds import Probability, Share
from hf_value_steer.choices import HeadMethod, PromiseMode


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
        default=None, metadata={"help": "make the threshold of this promise the default"}
    )
    token_rate: Probability | None = field(
        default=None, metadata={"help": "make the default threshold one that this share of tokens fails; no promise"}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "column of the prompts: thresholds for each group"}
    )
    seed: Annotated[int, Ge(0)] = field(
        default=0, metadata={"help": "seed of the choice of one generation for each prompt"}
    )

    def check(self) -> None:
        if self.alpha is not None and self.token_rate is not None:
            raise ValueError("`alpha` and `token_rate` both set the default threshold: pass one of them.")
        if (self.judge is None) != bool(self.attributes):
            raise ValueError("`judge` says which generations are safe, or `attributes` do: pass one of them.")
