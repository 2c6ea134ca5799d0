"""Links of our Markdown lead somewhere: to a file of the checkout, and to a heading that is there."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("model_cards/*/README.md")]
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^()\s]+)\)|(?:src|href)=\"(?!https?://)([^\"]+)\"")
HEADING = re.compile(r"^#+ +(.+?)(?: +\{#([\w-]+)\})?$", re.MULTILINE)


def anchors(page):
    """Names of the places in a page that both a Git host and the site know, and those of the reference."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for title, _ in HEADING.findall(text):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower()
        of_host, of_site = re.sub(r"\s", "-", plain), re.sub(r"[-\s]+", "-", plain)
        if of_host == of_site:
            yield of_host
    yield from re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def dead(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in (first or second for first, second in LINK.findall(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            yield link
        elif anchor and anchor not in set(anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page):
    assert list(dead(page)) == []


def test_dead_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `title`: of 2\n\n# One / two\n\n```\n# none\n```\n\n::: package.name\n")
    page, good = tmp_path / "page.md", ["there.md", "there.md#a-title-of-2", "there.md#package.name", "#here"]
    bad = ["gone.md", "there.md#none", "there.md#one-two", "there.md#one--two", "#gone", "../outside.md"]
    page.write_text("# Here\n\n`[code](gone.md)`\n" + "\n".join(f"[x]({link})" for link in good + bad))
    assert list(dead(page)) == bad
