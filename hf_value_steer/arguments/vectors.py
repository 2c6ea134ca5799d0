"""What `vectors extract`, `scale`, `apply` and `bake` are told; for `sweep` see `evaluate`."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Len

from hf_value_steer.arguments.base import BackboneArguments, SamplingArguments
from hf_value_steer.arguments.kinds import Count, Limit, NotNegative, Seed, Share
from hf_value_steer.choices import DirectionMethod, Pooling, VectorMode
from hf_value_steer.errors import FieldError


@dataclass(kw_only=True)
class ModelArguments(BackboneArguments):
    """The model that the vectors are of."""

    chat: bool = field(default=False, metadata={"help": "put texts into the model's chat template"})


@dataclass(kw_only=True)
class ExtractArguments(ModelArguments):
    """From `positive` and `negative`, from a labelled `collection`, from a `value_head`, or from a file of vectors."""

    output: str = field(metadata={"help": "folder of the vectors"})
    positive: str | None = field(default=None, metadata={"help": "texts with the attribute, as prompts of `collect`"})
    negative: str | None = field(default=None, metadata={"help": "texts without the attribute"})
    collection: str | None = field(default=None, metadata={"help": "folder that `collect` wrote"})
    judge: str | None = field(default=None, metadata={"help": "whose labels of the collection to go by"})
    value_head: str | None = field(default=None, metadata={"help": "folder or Hub id of a head"})
    texts: str | None = field(default=None, metadata={"help": "texts on which the head's gradient is taken"})
    vectors: str | None = field(default=None, metadata={"help": "a .gguf or .safetensors file to import"})
    method: DirectionMethod = field(default="mean_difference", metadata={"help": "how directions come out of texts"})
    pooling: Pooling | None = field(
        default=None, metadata={"help": "which states of a text count; of pairs the last by default"}
    )
    layers: Annotated[list[Share], Len(2, 2)] = field(
        default_factory=lambda: [0.4, 0.9], metadata={"help": "first and last layer to steer, as shares of the depth"}
    )
    attribute: str | None = field(default=None, metadata={"help": "what a positive multiplier brings more of"})

    def check(self) -> None:
        if self.layers != sorted(self.layers):
            raise FieldError("layers", f"`layers` has to be the lower before the higher, got {self.layers}.")
        if self.chat and (self.collection or self.vectors):
            raise FieldError(
                "chat", "`chat` is for `positive` and `negative`, or `texts`: a collection knows its own."
            )
        pairs = ((self.positive, self.negative), (self.collection, self.judge), (self.value_head, self.texts))
        if self.vectors is None and not any(all(pair) for pair in pairs):
            raise ValueError(
                "Pass `positive` and `negative`, `collection` and `judge`, `value_head` and `texts`, or `vectors`."
            )


@dataclass(kw_only=True)
class ScaleArguments(ModelArguments):
    """Strengths that follow the norm of the residual stream; the folder is changed in place."""

    vectors: str = field(metadata={"help": "folder of the vectors"})
    texts: str = field(metadata={"help": "a few dozen texts, as prompts of `collect`"})
    rho: NotNegative | None = field(
        default=None, metadata={"help": "relative influence at m = 1; 1/sqrt(width) if left out"}
    )


@dataclass(kw_only=True)
class ApplyArguments(ModelArguments, SamplingArguments):
    """Continue prompts with and without the vectors."""

    vectors: str = field(metadata={"help": "folder or Hub id of the vectors"})
    prompts: str = field(metadata={"help": "prompts to continue, as for `collect`"})
    multipliers: list[float] = field(
        default_factory=lambda: [-0.25, 0.25], metadata={"help": "which multipliers to show"}
    )
    limit: Limit | None = field(default=None, metadata={"help": "take the first so many prompts"})
    mode: VectorMode = field(default="broadcast", metadata={"help": "at which positions the vectors are added"})
    max_new_tokens: Count = field(default=64, metadata={"help": "the most tokens in a text"})
    seed: Seed = field(default=0, metadata={"help": "seed of sampling"})


@dataclass(kw_only=True)
class BakeArguments(ModelArguments):
    """Write a checkpoint that is steered by itself."""

    vectors: str = field(metadata={"help": "folder or Hub id of the vectors"})
    multiplier: float = field(metadata={"help": "how much of them; `sweep` says how far it can go"})
    output: str = field(metadata={"help": "folder of the checkpoint"})
    texts: str | None = field(default=None, metadata={"help": "texts to compare on; random tokens if left out"})
