"""What `train` is told: which preset, what otherwise, and which share of the prompts is for what."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from hf_value_steer.arguments.base import Arguments
from hf_value_steer.arguments.kinds import Amount, Count, Layers, NotNegative, NumpySeed, Part, Probability
from hf_value_steer.checks import check_attributes, check_decay, check_layers, check_projection
from hf_value_steer.choices import Loss, Polarity, Target, Temporal
from hf_value_steer.errors import FieldError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a head is fitted."""

    target: Target
    loss: Loss
    positive_weight: float
    coherence_weight: float
    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int


SUGGESTED = "suggested"  # as feature layers: let `suggest_feature_layers` choose
# What works out of the box. "value-steer" is that of the package of arXiv 2605.14746.
PRESETS = {
    "value-steer": Preset(
        target="response",
        loss="focal",
        positive_weight=0.7 / 0.3,
        coherence_weight=0.1,
        learning_rate=1e-4,
        weight_decay=0.01,
        epochs=10,
        patience=3,
    ),
    "hazard": Preset(
        target="hazard",
        loss="bce",
        positive_weight=1.0,
        coherence_weight=0.0,
        learning_rate=6e-4,
        weight_decay=0.05,
        epochs=12,
        patience=3,
    ),
}
PRESETS["onset"] = replace(PRESETS["hazard"], target="onset")


@dataclass(frozen=True)
class JudgedAttribute:
    """One of several attributes of a head: its name, whose labels it has, and what a high label means."""

    name: str
    judge: str
    polarity: Polarity


def parse_attributes(entries: Sequence[str]) -> list[JudgedAttribute]:
    """Read `name=judge` and `name=judge@desirable`.

    Raises:
        ValueError: names an entry that is neither.
    """
    attributes = []
    for entry in entries:
        name, _, judge = entry.partition("=")
        polarity: Polarity = "undesirable"
        for each in get_args(Polarity):
            if judge.endswith(f"@{each}"):
                judge, polarity = judge.removesuffix(f"@{each}"), each
        if not (name.strip() and judge):
            raise FieldError(
                "attributes", f"`attributes` takes entries name=judge or name=judge@desirable, got {entry!r}."
            )
        attributes.append(JudgedAttribute(name.strip(), judge, polarity))
    return attributes


@dataclass(kw_only=True)
class SplitArguments(Arguments):
    """Which share of the prompts is for what; the rest trains."""

    validation: Probability = field(default=0.15, metadata={"help": "share of the prompts that stop the training"})
    calibration: Part = field(default=0.15, metadata={"help": "share of the prompts that only `calibrate` sees"})
    held_out: Part = field(default=0.0, metadata={"help": "share of the prompts that only `evaluate` sees"})
    rotation: Part = field(default=0.0, metadata={"help": "where the splits begin, in [0, 1): for cross-fitting"})

    def check(self) -> None:
        shares = (self.validation, self.calibration, self.held_out)
        if sum(shares) >= 1:
            raise ValueError(
                "`validation`, `calibration` and `held_out` have to be shares that leave prompts to train on; "
                f"got {shares}."
            )


@dataclass(kw_only=True)
class TrainArguments(SplitArguments):
    """What to train. `None` stands for what the preset says."""

    collection: str = field(metadata={"help": "folder of a labelled collection"})
    output: str = field(metadata={"help": "folder of the head"})
    judge: str | None = field(default=None, metadata={"help": "the judge whose labels are learned"})
    attribute: str | None = field(default=None, metadata={"help": "what is valued, for instance toxicity"})
    polarity: Polarity = field(default="undesirable", metadata={"help": "what a high label means"})
    attributes: list[str] = field(
        default_factory=list,
        metadata={"help": "instead of a judge, for a head of several attributes: name=judge or name=judge@desirable"},
    )
    combine: Literal["worst", "sum"] = field(
        default="worst", metadata={"help": "how several attributes are one value"}
    )
    architecture: Literal["mlp", "linear"] = field(default="mlp", metadata={"help": "architecture of the head"})
    projection_size: Count | None = field(
        default=None, metadata={"help": "width of the inner layers of an mlp; that of what it reads by default"}
    )
    feature_layers: Layers | None = field(
        default=None,
        metadata={
            "help": "layers that the head reads; those named in `collect` by default, to be named after `all`; or "
            "`suggested`: the cheapest that may be as good as the best one, and its memory, by probes of the prompts "
            "that train"
        },
    )
    temporal: Temporal = field(
        default="none", metadata={"help": "what the head remembers of the tokens before: nothing, or a mean of them"}
    )
    temporal_decay: Probability | None = field(
        default=None, metadata={"help": "with `temporal` ema, the weight of what was before; 0.9 by default"}
    )
    preset: Literal["value-steer", "hazard", "onset"] = field(
        default="value-steer",
        metadata={
            "help": "defaults of target, loss, weights, learning rate, decay, epochs and patience; what you give wins",
            "was": "recipe",
        },
    )
    target: Target | None = field(default=None, metadata={"help": "what a token is labelled with"})
    loss: Loss | None = field(default=None, metadata={"help": "loss of a token"})
    positive_weight: NotNegative | None = field(default=None, metadata={"help": "weight of the positive class"})
    coherence_weight: NotNegative | None = field(
        default=None, metadata={"help": "weight of the term that keeps neighbouring values together (TD coherence)"}
    )
    learning_rate: NotNegative | None = field(default=None, metadata={"help": "learning rate of AdamW"})
    weight_decay: NotNegative | None = field(default=None, metadata={"help": "weight decay of AdamW"})
    epochs: Count | None = field(default=None, metadata={"help": "passes over the training texts, at most"})
    patience: Amount | None = field(default=None, metadata={"help": "epochs without improvement before it stops"})
    batch_rows: Count = field(default=32, metadata={"help": "generations in one step"})
    seed: NumpySeed = field(default=0, metadata={"help": "seed of weights and order"})
    accept_chance: bool = field(
        default=False, metadata={"help": "go on with a head that is no better than chance on the validation texts"}
    )
    trainer: list[str] = field(
        default_factory=list,
        metadata={"help": "further TrainingArguments as name=value, for instance report_to=wandb, bf16=true"},
    )

    def check(self) -> None:
        super().check()
        if (self.judge is None) != bool(self.attributes):
            raise ValueError(
                "`judge` says whose labels are learned, or `attributes` do, for several: pass one of them."
            )
        if self.attributes:
            check_attributes(self.head_attributes())
            if self.polarity != "undesirable":
                raise ValueError(
                    "`polarity` is that of a single attribute; `attributes` say theirs: name=judge@desirable."
                )
        elif self.combine != "worst":
            raise ValueError(f"`combine`={self.combine!r} is for several `attributes`.")
        check_projection(self.projection_size, self.architecture)
        check_decay(self.temporal_decay, self.temporal)
        if self.feature_layers == [SUGGESTED]:
            self._check_suggested()
        elif self.feature_layers is not None:
            check_layers(self.feature_layers)

    def _check_suggested(self) -> None:
        if self.attributes or self.temporal != "none":
            raise FieldError(
                "feature_layers", f"`feature_layers` {SUGGESTED!r} is for one `judge`, and chooses `temporal`, too."
            )

    def judges(self) -> list[str]:
        """Whose labels are learned, one judge for each attribute."""
        return [each.judge for each in parse_attributes(self.attributes)] or [str(self.judge)]

    def head_attributes(self) -> list[dict[str, Any]]:
        """Those of [`ValueHeadConfig`]; every threshold is one half until `calibrate` sets it."""
        parsed = parse_attributes(self.attributes)
        return [{"name": each.name, "polarity": each.polarity, "threshold": 0.5} for each in parsed]

    def record(self) -> dict[str, Any]:
        """What `training.json` keeps: what makes the head; what was not always there only where it is used."""
        left_out = ["collection", "output", "accept_chance", *(() if self.attributes else ("attributes", "combine"))]
        newer = ("projection_size", "feature_layers", "temporal", "temporal_decay")
        left_out += [name for name in newer if getattr(self, name) in (None, "none")]
        return {name: choice for name, choice in asdict(self).items() if name not in left_out}

    def settings(self) -> Preset:
        """The preset, with what was chosen otherwise."""
        chosen = {each.name: getattr(self, each.name) for each in fields(Preset)}
        return replace(PRESETS[self.preset], **{name: value for name, value in chosen.items() if value is not None})
