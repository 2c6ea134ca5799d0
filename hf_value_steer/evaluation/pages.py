"""Pages, out of the templates that lie beside this file. What is put into them is text, and never becomes markup."""

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def breaks(text: str) -> Markup:
    """A text in whose names a line may end after a mark, as in `python:package.function`, and nowhere else."""
    return Markup(re.sub(r"(?<=[^\W\d])([:./_#]+)(?=[^\W\d])", r"\1<wbr>", str(escape(text))))


def templates(*packages: str) -> Environment:
    """The templates that lie in these packages and beside this file."""
    loader = ChoiceLoader([PackageLoader(each, ".") for each in (*packages, "hf_value_steer.evaluation")])
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    found.filters["breaks"] = breaks
    return found


_PAGES = templates()


def render(template: str, **parts: Any) -> str:
    """A page."""
    return _PAGES.get_template(template).render(parts)
