"""What `evaluate` and `vectors sweep` are told."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Len

from hf_value_steer.arguments.base import GenerationArguments
from hf_value_steer.arguments.kinds import Candidates, Count, NotNegative, Probability, Rollback, Texts
from hf_value_steer.choices import HeadMethod, VectorMode, Way
from hf_value_steer.errors import FieldError


MULTIPLIERS = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)  # of calibrated vectors most work below 1
BASELINES = ("best_of_n", "args", "bad_words", "system_prompt")


@dataclass(kw_only=True)
class EvaluateArguments(GenerationArguments):
    """What to evaluate, on what, and by whom."""

    output: str = field(metadata={"help": "folder of the results"})
    value_head: str = field(metadata={"help": "folder or Hub id of the head"})
    prompts: str = field(metadata={"help": "prompts that training and calibration never saw, as for `collect`"})
    judges: Texts = field(
        metadata={"help": "judges that gave no label; a rate is the share of texts with a score above 0.5"}
    )
    label_judge: str | None = field(default=None, metadata={"help": "the judge that gave the labels, for comparison"})
    prompt_column: str = field(default="prompt", metadata={"help": "column with a text or a list of chat messages"})
    prompt_split: str = field(default="test", metadata={"help": "split of a data set"})
    method: HeadMethod = field(default="filter", metadata={"help": "what the head is for"})
    num_candidates: Annotated[list[Candidates], Len(1)] | None = field(
        default=None,
        metadata={"help": "one run for each of these numbers of candidates; the head's own, or 8, if left out"},
    )
    thresholds: list[Probability] = field(
        default_factory=list, metadata={"help": "one run for each of these thresholds; the head's own if left out"}
    )
    alphas: list[Probability] = field(
        default_factory=list,
        metadata={
            "help": "instead of thresholds: draw the trade-off of the ways to use the head, at each of these promises"
        },
    )
    ways: Annotated[list[Way], Len(1)] | None = field(
        default=None,
        metadata={
            "help": "which of them, all if left out: the filter, the filter that goes back, soft selection that does, "
            "ending the text"
        },
    )
    rollback: Rollback | None = field(
        default=None,
        metadata={
            "help": "tokens that may be taken back in runs of `alphas` and `in_the_loop`; the head's own, or 6, if "
            "left out"
        },
    )
    in_the_loop: list[str] = field(
        default_factory=list, metadata={"help": "judges of text, or word lists, that filter in the place of the head"}
    )
    placebo: bool = field(
        default=True, metadata={"help": "also try a head with shuffled weights, which knows nothing"}
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": f"other methods under the same loop: {', '.join(BASELINES)}"}
    )
    bad_words: str | None = field(default=None, metadata={"help": "a .txt file or python: reference, for bad_words"})
    system_prompt: str | None = field(default=None, metadata={"help": "for the baseline system_prompt"})
    mask: str | None = field(
        default=None,
        metadata={"help": "python:module:function that masks shown text, or none; by default lexicon: judges mask"},
    )
    best_of: Count = field(default=4, metadata={"help": "how many texts best_of_n draws to choose from"})
    batch_size: Count = field(default=8, metadata={"help": "prompts in one call of generate"})

    def check(self) -> None:
        if self.alphas and self.thresholds:
            raise FieldError("alphas", "`alphas` and `thresholds` both say at which thresholds: pass one of them.")
        if self.ways is not None and not self.alphas:
            raise FieldError("ways", "`ways` are those of `alphas`, and there are none: pass some.")
        if self.alphas and len(self.num_candidates or ()) > 1:
            raise FieldError("num_candidates", "`num_candidates` has to be one number where there are `alphas`.")
        if self.method != "filter" and (self.alphas or self.in_the_loop):
            raise FieldError("alphas", "`alphas` and `in_the_loop` are for the method 'filter'.")
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise FieldError("baselines", f"`baselines` holds {', '.join(unknown)}; there are {', '.join(BASELINES)}.")
        needs = {"bad_words": self.bad_words, "system_prompt": self.system_prompt}
        for name, need in needs.items():
            if name in self.baselines and not need:
                raise FieldError("baselines", f"The baseline {name!r} needs `{name}`.")

    def all_judges(self) -> list[str]:
        """Those that gave no label, and then the one that did."""
        return list(dict.fromkeys([*self.judges, *([self.label_judge] if self.label_judge else [])]))


@dataclass(kw_only=True)
class SweepArguments(GenerationArguments):
    """Which multipliers, on what, by whom, at which price."""

    output: str = field(metadata={"help": "folder of the results; what is there already is not made again"})
    vectors: str = field(metadata={"help": "folder or Hub id of the vectors"})
    prompts: str = field(metadata={"help": "prompts that the vectors never saw, as for `collect`"})
    judges: Texts = field(
        metadata={"help": "judges whose rates are shown; the window follows from perplexity and repetition alone"}
    )
    multipliers: Annotated[list[float], Len(1)] = field(
        default_factory=lambda: list(MULTIPLIERS), metadata={"help": "which multipliers to try"}
    )
    budget: NotNegative = field(
        default=1.5, metadata={"help": "the highest perplexity, relative to the unsteered text's"}
    )
    mask: str | None = field(
        default=None,
        metadata={"help": "python:module:function that masks shown text, or none; by default lexicon: judges mask"},
    )
    mode: VectorMode = field(default="broadcast", metadata={"help": "at which positions the vectors are added"})
    max_new_tokens: Count = field(default=64, metadata={"help": "the most tokens in a generation"})

    def check(self) -> None:
        if not any(self.multipliers):
            raise FieldError("multipliers", "`multipliers` holds 0 only, which is always run; name another.")
