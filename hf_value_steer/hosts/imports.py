"""Something that waits for the import of another package, instead of importing it."""

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def when_imported(package: str, function: Callable[[], None], needed_by: Callable[[str], bool]) -> None:
    """Call `function` now, if `package` is imported already, or else at the end of its import.

    Args:
        package: the name of a package.
        function: is called once. It may import what it likes.
        needed_by: whether a module of this name imports `package`. Then that is imported before the module, so that
            `function` never meets a half imported one.
    """
    if package in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Waiting(package, function, needed_by))


class _Waiting:
    """Is asked about every import until the package is imported, and takes itself away then.

    Nothing within the package is half imported when `function` is called: what imports a module of it imports the
    package before. A mere look for the package, or an import of it that fails, changes nothing.
    """

    def __init__(self, package: str, function: Callable[[], None], needed_by: Callable[[str], bool]):
        self.package, self.function, self.needed_by = package, function, needed_by
        self.asking = threading.local()  # whether this thread asks all other finders

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if self.needed_by(name):
            import_module(self.package)
        if name != self.package or getattr(self.asking, "others", False):
            return None
        self.asking.others = True
        try:
            spec = find_spec(name)
        finally:
            self.asking.others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_then(module: ModuleType) -> None:
                execute(module)
                self.function()
                sys.meta_path.remove(self)

            spec.loader.exec_module = and_then  # type: ignore[method-assign]
        return spec
