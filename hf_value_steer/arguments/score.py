"""What `score` is told."""

from dataclasses import dataclass, field

from hf_value_steer.arguments.base import BackboneArguments
from hf_value_steer.arguments.kinds import Count, Limit, Probability


@dataclass(kw_only=True)
class ScoreArguments(BackboneArguments):
    """Which texts are scored, by what."""

    value_head: str = field(metadata={"help": "folder or Hub id of the head"})
    texts: str = field(metadata={"help": "a .txt file (one text a line), a .jsonl file, a data set, or python:..."})
    text_column: str = field(default="text", metadata={"help": "column of a record that holds the text"})
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "column of what stands before the text: a text, or chat messages; it is not scored"},
    )
    chat: bool | None = field(
        default=None, metadata={"help": "put prompts into the model's chat template; as in training by default"}
    )
    split: str = field(default="train", metadata={"help": "split of a data set"})
    limit: Limit | None = field(default=None, metadata={"help": "take the first so many texts"})
    threshold: Probability | None = field(default=None, metadata={"help": "in (0, 1); that of the head by default"})
    alpha: Probability | None = field(
        default=None, metadata={"help": "in place of a threshold: the promise of the head's calibration, in (0, 1)"}
    )
    values: bool = field(default=False, metadata={"help": "list every token with its value, too"})
    batch_size: Count = field(default=8, metadata={"help": "texts in one forward"})
