"""The pages of the site: those from outside docs/, and links that leave docs/."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ["CHANGELOG.md", "model_cards/*/README.md", "examples/*.py", "examples/recipes/*"]
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#)([^()#\s]+)(#[^()\s]*)?\)")


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
