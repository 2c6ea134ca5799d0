"""Pages, out of the templates that lie beside this file. What is put into them is text, and never becomes markup."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


_PAGES = Environment(
    loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
)


def render(template: str, **parts: Any) -> str:
    """A page."""
    return _PAGES.get_template(template).render(parts)
