"""What is short can be read: no function of the library is longer than 40 lines, no file longer than 300."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2] / "hf_value_steer"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 40


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` on, its docstring not counted."""
    said = function.body[0] if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    nodes = [each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: length(node) for node in nodes if length(node) > MOST_LINES_OF_A_FUNCTION} == {}
    lines = text.count("\n")
    assert lines <= MOST_LINES
