"""Judges: what says whether an attribute is there in a response (toxic, negative, correct, ...).

A judge is named by a text, so that a recipe can name it and an artefact can say who gave its labels:

- `lexicon:PATH`: words, phrases and regular expressions, one a line.
- `classifier:MODEL` or `classifier:MODEL#LABEL`: a text-classification model of `transformers`.
- `reward:MODEL`: a sequence-classification model with one output, which reads prompt and response.
- `llm:URL#MODEL` or `llm:URL#MODEL#TEMPLATE`: a language model behind an OpenAI-compatible server.
- `math:COLUMN`: whether the response agrees with a column of the prompt's record, by the `math-verify` package.
- `python:module:function`: a function of prompts and responses.
"""

from collections.abc import Sequence

from hf_value_steer.checks import import_optional
from hf_value_steer.judges.agreement import agreement
from hf_value_steer.judges.base import Judge
from hf_value_steer.judges.llm import LLMJudge
from hf_value_steer.judges.models import ClassifierJudge, RewardJudge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.judges.text import LexiconJudge, MathJudge, PythonJudge


__all__ = ["Judge", "agreement", "check_judges", "load_judge"]

_FORMS = {
    "lexicon": "lexicon:PATH",
    "classifier": "classifier:MODEL[#LABEL]",
    "reward": "reward:MODEL",
    "llm": "llm:URL#MODEL[#TEMPLATE]",
    "math": "math[:COLUMN]",
    "python": "python:module:function",
}


def load_judge(spec: str, *, batch_size: int = 16, device: str | None = None) -> Judge:
    """Make the judge that `spec` names.

    Args:
        spec (`str`): one of the forms that the module lists; see the judges' classes for their details.
        batch_size (`int`): rows of a forward pass (`classifier:`, `reward:`), requests at a time (`llm:`).
        device (`str`, *optional*): of the model (`classifier:`, `reward:`); by default a CUDA device if there is one.

    Returns:
        A callable: `judge(prompts, responses)` gives one number in [0, 1] for each response, and has checked them.

    Raises:
        ValueError: if `spec` has none of the forms, or what it names is not there or is no judge.
        ImportError: if a package is missing; the error says how to install it.
    """
    kind, _, target = spec.partition(":")
    match kind:
        case "math":
            return MathJudge(spec, target or "answer")
        case "lexicon" if target:
            return LexiconJudge(spec, target)
        case "python" if target:
            return PythonJudge(spec)
        case "classifier" if target:
            return ClassifierJudge(spec, target, batch_size, device)
        case "reward" if target:
            return RewardJudge(spec, target, batch_size, device)
        case "llm" if target:
            return LLMJudge(spec, target, batch_size)
    expected = _FORMS.get(kind) or "one of " + ", ".join(_FORMS.values())
    raise ValueError(f"{spec!r} names no judge; expected {expected}.")


def check_judges(specs: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Load every judge, and let go of it: what is wrong with it shows before anything is generated for it.

    On the CPU, where a model takes no room from the one that generates.

    Args:
        specs (sequence of `str`): as in [`load_judge`].
        prompts (sequence of [`Prompt`]): of the responses that they will judge.

    Raises:
        ValueError, ImportError: as in [`load_judge`], and if a prompt lacks what a judge needs.
    """
    import_optional("sklearn.metrics", "The agreement of judges")
    for spec in specs:
        load_judge(spec, device="cpu").check(prompts)
