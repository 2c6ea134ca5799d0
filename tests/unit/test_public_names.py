"""What people are told to import is there, and what is exported is told of."""

import ast
import importlib
import pkgutil
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_value_steer


ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAID = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
REFERENCE = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
DESCRIBED = re.findall(r"^::: ([\w.]+)$", "\n".join(REFERENCE.values()), re.MULTILINE)
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def snippets(path):
    text = path.read_text(encoding="utf-8")
    return [text] if path.suffix == ".py" else re.findall(r"```python(?: no-run)?\n(.*?)```", text, re.DOTALL)


def told():
    """What texts and examples import of ours: where it is said, the module, and the name."""
    for path in [*TEXTS, *CARDS, *EXAMPLES]:
        for node in (node for code in snippets(path) for node in ast.walk(ast.parse(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_value_steer":
                yield from ((path.relative_to(ROOT).as_posix(), node.module, alias.name) for alias in node.names)


def exported():
    """The names in the `__all__` of each module that has one."""
    found = {"hf_value_steer": hf_value_steer.__all__}
    for path in sorted((ROOT / "hf_value_steer").glob("*/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
                found[name] = ast.literal_eval(node.value)
    return found


def is_there(module, name):
    """Whether `from module import name` gives something that is exported, or a module."""
    if module in exported():
        return name in exported()[module] or find_spec(f"{module}.{name}") is not None
    return hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("where", "module", "name"), sorted(set(told())))
def test_what_is_told_can_be_imported(where, module, name):
    assert is_there(module, name), f"{where}: from {module} import {name}"


@pytest.mark.parametrize("module", sorted(exported()))
def test_what_is_exported_is_there_and_in_the_reference(module):
    """What a package exports again of `hf_value_steer` is described there, and named on the package's page."""
    above = set(hf_value_steer.__all__) if module != "hf_value_steer" else set()
    own = [name for name in exported()[module] if name not in above]
    of_a_module = {f"{module}.{name}.{name}": name for name in own}  # a function that hides the module of its name
    found = [of_a_module.get(name, name.removeprefix(f"{module}.")) for name in DESCRIBED]
    assert [name for name in own if name not in found] == []
    page = REFERENCE["index.md" if module == "hf_value_steer" else f"{module.rpartition('.')[2]}.md"]
    assert [name for name in exported()[module] if not re.search(rf"\b{name}\b", page)] == []
    assert all(hasattr(importlib.import_module(module), name) for name in exported()[module])


def test_the_reference_is_of_what_is_public():
    assert len(DESCRIBED) == len(set(DESCRIBED))
    packages = {f"hf_value_steer.{each.name}" for each in (ROOT / "hf_value_steer").iterdir()}
    at_the_top = [name.rpartition(".")[2] for name in DESCRIBED if name.count(".") == 1 and name not in packages]
    listed = re.findall(r"\(#hf_value_steer\.(\w+)\)", REFERENCE["index.md"])
    assert set(at_the_top) == set(listed) == set(hf_value_steer.__all__) and len(listed) == len(set(listed))


@pytest.mark.parametrize("module", ["activation", "calibration", "evaluation", "guidance", "training", "vllm"])
def test_packages_say_what_is_public(module):
    assert f"hf_value_steer.{module}" in exported()


def test_what_texts_and_docstrings_name_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hf_value_steer").rglob("*.py")]
    named = set(re.findall(r"`~?(hf_value_steer(?:\.\w+)+)`", "\n".join([SAID, *sources])))
    assert len(named) > 10
    for name in named:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("BridgeGuidanceConfig", "GuidanceConfig"),
        ("ValueGuidanceConfig", "GuidanceModuleConfig"),
        ("ValueGuidanceModule", "GuidanceModule"),
    ],
)
def test_what_older_cards_import_is_there_under_its_old_name(old, new):
    with pytest.warns(DeprecationWarning, match=f"`{old}` is `{new}` now"):
        assert getattr(hf_value_steer, old) is getattr(hf_value_steer, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(f"from hf_value_steer import {old}", {})
    assert old not in hf_value_steer.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Guidance'"):
        hf_value_steer.Guidance  # noqa: B018
