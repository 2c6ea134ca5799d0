"""What `guidance train` is told."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_value_steer.arguments.base import Arguments, BackboneArguments
from hf_value_steer.arguments.kinds import Amount, Count, Limit, NotNegative, NumpySeed, Share
from hf_value_steer.arguments.train import SplitArguments
from hf_value_steer.choices import TargetOfAll


@dataclass(kw_only=True)
class LossWeights(Arguments):
    """Of the third stage, as in the paper's code; `avoid` and `keep` are ours, and 0 there.

    Args:
        ce: cross-entropy of the next tokens of safe natural responses.
        safe: `softplus(s) + ALPHA * relu(s)` of guided tokens, read one layer above l*.
        manifold: how far the norm of bridges is from that of the states they were made from, beyond `TAU`.
        avoid: `-log(1 - p)`, with the probability of all next tokens that the judge dislikes.
        keep: divergence from the backbone among the other next tokens.
    """

    ce: float = field(default=0.5, metadata={"help": "weight of the cross-entropy of safe responses"})
    safe: float = field(default=2.0, metadata={"help": "weight of the dense safety loss"})
    manifold: float = field(default=0.1, metadata={"help": "weight of the manifold loss"})
    avoid: float = field(
        default=0.0, metadata={"help": "weight of -log(1 - p) of next tokens that the judge dislikes"}
    )
    keep: float = field(
        default=0.0, metadata={"help": "weight of the divergence from the backbone among other tokens"}
    )


@dataclass(kw_only=True)
class GuidanceTrainArguments(SplitArguments, BackboneArguments, LossWeights):
    """What to train. Learning rates, epochs and loss weights are those of the paper's code unless said otherwise."""

    collection: str = field(metadata={"help": "folder of a labelled collection"})
    output: str = field(metadata={"help": "folder of the module"})
    judge: str = field(metadata={"help": "the judge whose labels are learned"})
    attribute: str | None = field(default=None, metadata={"help": "what is valued, for instance toxicity"})
    target: TargetOfAll = field(default="response", metadata={"help": "what a token is labelled with"})
    layer: Amount | None = field(
        default=None, metadata={"help": "layer l* whose states are valued; by default what a probe sweep finds"}
    )
    num_bridges: Count | None = field(
        default=None, metadata={"help": "bridge tokens K; by default what a probe sweep finds"}
    )
    value_width: Count | None = field(
        default=None, metadata={"help": "width of the value network; by default what a probe sweep finds"}
    )
    bridge_heads: Count = field(default=8, metadata={"help": "attention heads of the bridge generator"})
    correction: Literal["gradient", "newton"] = field(default="newton", metadata={"help": "how a value is corrected"})
    step: NotNegative = field(default=1.0, metadata={"help": "factor of the correction"})
    conditional: bool = field(default=True, metadata={"help": "whether the prompt takes part"})
    injection: Literal["bridge", "inject"] = field(
        default="bridge",
        metadata={"help": "bridge: later layers get extra states; inject: the correction is added to the states"},
    )
    guided_share: Share | None = field(
        default=None, metadata={"help": "set the threshold so that this share of tokens is guided; 0.5 otherwise"}
    )
    neutral_when_safe: bool = field(
        default=True, metadata={"help": "in stage three, teach the generator to change nothing where the text is safe"}
    )
    gate: float = field(default=-2.0, metadata={"help": "strength of the generator at the start, before softplus"})
    text_epochs: Count = field(default=5, metadata={"help": "epochs of stage one"})
    pair_epochs: Count = field(default=5, metadata={"help": "epochs of stage two"})
    bridge_epochs: Count = field(default=5, metadata={"help": "epochs of stage three"})
    text_rate: NotNegative = field(default=1e-4, metadata={"help": "learning rate of stage one"})
    pair_rate: NotNegative = field(
        default=5e-4, metadata={"help": "learning rate of the conditional path in stage two"}
    )
    pair_slow_rate: NotNegative = field(default=1e-5, metadata={"help": "learning rate of the rest in stage two"})
    bridge_rate: NotNegative = field(default=5e-4, metadata={"help": "learning rate of stage three"})
    batch_rows: Count = field(default=8, metadata={"help": "generations in one step"})
    moments: Count = field(default=64, metadata={"help": "tokens that are guided in one step of stage three"})
    bridge_rows: Limit | None = field(default=None, metadata={"help": "generations of stage three, at most"})
    seed: NumpySeed = field(default=0, metadata={"help": "seed of weights and order"})
    trainer: list[str] = field(
        default_factory=list, metadata={"help": "further TrainingArguments as name=value, for all stages"}
    )

    def record(self) -> dict[str, Any]:
        """What `training.json` keeps: not where things lie."""
        return {name: choice for name, choice in asdict(self).items() if name not in ("collection", "output")}
