"""Texts as markup: what is put into the templates is text, and stays text."""

from collections.abc import Sequence

from hf_value_steer.evaluation.pages import templates
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.playground.writing import Turn


_TEMPLATES = templates(__package__)


def texts(turns: Sequence[Turn]) -> str:
    """The prompts of a tab with their two texts, every token coloured by its value."""
    return _TEMPLATES.get_template("texts.html").render(turns=turns)


def top(model: str, head: ValueHead) -> str:
    """What stands above all: what is played with, and what colours and frames mean."""
    return _TEMPLATES.get_template("top.html").render(model=model, head=head.config)


def style() -> str:
    """The style sheet of both."""
    return _TEMPLATES.get_template("playground.css").render()
