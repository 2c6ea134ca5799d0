"""Pages, out of the templates that lie beside this file. What is put into them is text, and never becomes markup."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def templates(*packages: str) -> Environment:
    """The templates that lie in these packages and beside this file."""
    loader = ChoiceLoader([PackageLoader(each, ".") for each in (*packages, "hf_value_steer.evaluation")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)


_PAGES = templates()


def render(template: str, **parts: Any) -> str:
    """A page."""
    return _PAGES.get_template(template).render(parts)
