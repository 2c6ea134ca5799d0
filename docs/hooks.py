"""What the site needs: pages from outside docs/, links that leave docs/, and our docstrings as Markdown."""

import ast
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ["CHANGELOG.md", "model_cards/*/README.md", "examples/*.py", "examples/recipes/*"]
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#)([^()#\s]+)(#[^()\s]*)?\)")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n((?: +\S.*\n?|\n)+)", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Cards, changelog and examples belong to the site, too; where they lie in the checkout they lie in the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links lead to where a file of the checkout is in the site; those to files that are not in it become text."""
    here = page.file.src_uri
    home = posixpath.dirname(here if page.file.generated_by else f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, to, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(home, to))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            names = ("index.md" if target == "README.md" else target, f"{target}/README.md")
            target = next((name for name in names if files.get_file_from_path(name)), "")
        if not target:
            return text
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(link, markdown.replace("```python no-run\n", "```python\n"))


class Docstrings(griffe.Extension):
    """Our docstrings are Markdown but for their sections, which become lists, and references like [`Name`], links."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(pkg: griffe.Module, obj: griffe.Object) -> None:
    if isinstance(obj, griffe.Attribute) and "metadata=" in str(obj.value):
        _tell_help(obj)
    if obj.docstring is not None:
        linked = REFERENCE.sub(lambda match: _link(pkg, obj, match[1]), obj.docstring.value)
        obj.docstring.value = SECTION.sub(_section, linked)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(pkg, member)


def _tell_help(field: griffe.Attribute) -> None:
    """A field of what a command is told: its docstring is the command's help."""
    call = ast.parse(str(field.value), mode="eval").body
    said = {keyword.arg: keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}
    field.value = ast.unparse(said["default"]) if "default" in said else None
    if isinstance(metadata := said.get("metadata"), ast.Dict):
        told = {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
        parts = getattr(told["'help'"], "values", [told["'help'"]])  # of an f-string
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        field.docstring = griffe.Docstring(text, parent=field)


def _section(match: re.Match[str]) -> str:
    body = textwrap.dedent(match[2])
    if match[1] in ("Args", "Attributes", "Raises"):
        body = re.sub(r"^(\w+(?:, \w+)*)", r"- `\1`", body, flags=re.MULTILINE)
    return f"**{match[1]}**\n\n{body}"


def _link(pkg: griffe.Module, obj: griffe.Object, name: str) -> str:
    """A link where the reference has a place for this name, else code."""
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = f"{pkg.path}.{name}" if name in pkg.members else name
    return f'<autoref identifier="{target}" optional><code>{name.rsplit(".", 1)[-1]}</code></autoref>'
