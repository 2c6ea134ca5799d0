"""Every Python block of README and of the documentation runs: those of a page in order, in one namespace.

A block that needs a GPU, a server or the Hub is fenced as `python no-run`; it only has to be Python.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from examples.smollm2 import backbone_folder


ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```python(| no-run)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """The blocks of a page, compiled so that an error names its line: whether each runs, and its code."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        before = text.count("\n", 0, match.start(3))
        tree = ast.increment_lineno(ast.parse(textwrap.dedent(match[3])), before)
        yield not match[2], compile(tree, str(page), "exec")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty folder that looks like a checkout after `make demo`: what a page writes stays out of the real one."""
    (tmp_path / ".cache").symlink_to(backbone_folder().parent)
    for name in ("examples", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_snippet_runs(page, checkout):
    namespace = {"__name__": "__main__"}
    for runs, code in blocks(page):
        if runs:
            exec(code, namespace)


def test_no_snippet_is_overlooked():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"```(?:py|python|pycon)\b", text)) == len(FENCE.findall(text)), page
