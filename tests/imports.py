"""Who imports whom: circles between files and between units of the package, and the longest chain of units.

    python -m tests.imports

Everything counts that could be imported at any time: inside functions, under `TYPE_CHECKING`, relative, and by a text
that is given to `import_module`. A unit is the first name below the package. That a file runs the `__init__.py` of the
packages around it does not count.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "hf_value_steer"
Graph = Mapping[str, set[str]]


def files(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports."""
    modules = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {
        name: {found for found in _imported(path, name, modules) if found != name} for name, path in modules.items()
    }


def units(graph: Graph) -> dict[str, set[str]]:
    """The same between the units of the package."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        found.setdefault(unit(name), set()).update(unit(other) for other in imported)
    return {name: others - {name} for name, others in found.items()}


def unit(module: str) -> str:
    """The first name below the package; of the package itself its own."""
    return module.split(".")[:2][-1]


def circles(graph: Graph) -> list[list[str]]:
    """The groups of names that import each other, on whatever way."""
    beyond = {name: _beyond(name, graph) for name in graph}
    groups = {frozenset(other for other in beyond[name] if name in beyond[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def longest_chain(graph: Graph) -> list[str]:
    """The most names of which each imports the next. There must be no circle."""

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in sorted(graph[name])), key=len, default=()))

    return list(max((below(name) for name in sorted(graph)), key=len))


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, name: str, modules: Mapping[str, Path]) -> Iterator[str]:
    around = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for asked in _asked(node, around):
            module = asked if asked in modules else asked.rpartition(".")[0]  # or else a name inside of one
            if module in modules:
                yield module


def _asked(node: ast.AST, around: str) -> list[str]:
    """The dotted names that a statement or a call imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            levels = around.split(".")
            base = levels[: len(levels) - node.level + 1] if node.level else []
            return [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        case ast.Call(
            func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(asked)), *_]
        ):
            return [asked] if called in ("import_module", "__import__") else []
    return []


def _beyond(name: str, graph: Graph) -> set[str]:
    """What `name` imports, and what that imports, and so on."""
    found: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += graph[other]
    return found


def main() -> int:
    modules = files()
    packages = units(modules)
    found = 0
    for what, graph in (("files", modules), ("units", packages)):
        around = circles(graph)
        found += len(around)
        print(f"{len(graph)} {what}, circles: {len(around)}")
        for group in around:
            print(f"  {', '.join(group)}")
    if not found:
        chain = longest_chain(packages)
        print(f"longest chain: {len(chain)}, {' > '.join(chain)}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
