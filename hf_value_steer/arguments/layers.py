"""What `layers` is told."""

from dataclasses import dataclass, field

from hf_value_steer.arguments.kinds import Folds, Limit
from hf_value_steer.arguments.train import SplitArguments
from hf_value_steer.choices import Target


@dataclass(kw_only=True)
class LayersArguments(SplitArguments):
    """Which labels a layer should know."""

    collection: str = field(metadata={"help": "folder of a labelled collection that keeps several `feature_layers`"})
    judge: str = field(metadata={"help": "the judge whose labels are to be known"})
    target: Target = field(default="response", metadata={"help": "what a token is labelled with"})
    folds: Folds = field(default=5, metadata={"help": "parts of the prompts; each is scored by a probe of the others"})
    limit: Limit = field(default=500, metadata={"help": "generations that are read, at most"})
