"""The floors of the package: imports go down only."""

import pytest

from tests.imports import circles, files, longest_chain, units


MOST = 10


def test_no_file_and_no_unit_imports_itself_on_any_way():
    assert circles(files()) == [] and circles(units(files())) == []


def test_the_longest_chain_of_units_is_short():
    assert len(longest_chain(units(files()))) <= MOST


@pytest.mark.parametrize(
    "text",
    [
        "from package.b import name",
        "from package import b",
        "import package.b.c",
        "from . import b",
        "from .b import c",
        "from ..package.b import name",
        "def later():\n    from package.b.c import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.b import name",
        "import importlib\nimportlib.import_module('package.b')",
        "from importlib import import_module\nimport_module('package.b.c')",
    ],
)
def test_every_kind_of_import_counts(tmp_path, text):
    package = tmp_path / "package"
    (package / "b").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "a.py").write_text(text)
    (package / "b" / "__init__.py").touch()
    (package / "b" / "c.py").write_text("from ..a import name")
    found = units(files(package))
    assert found == {"package": set(), "a": {"b"}, "b": {"a"}} and circles(found) == [["a", "b"]]
    (package / "b" / "c.py").write_text("")
    assert circles(files(package)) == [] and longest_chain(units(files(package))) == ["a", "b"]
