"""Hooks that the user has registered on a model, as a shadow of it runs them.

A hook is given the module of the model, not of the shadow: it may be the key of a table. What it writes there, on its
own module or on another one of the model, is then taken over by the shadow, whose forward may read it.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


# These write on the module that they are given, for its own forward, and know no other: they get the shadow's.
_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.", "hf_value_steer.")


def is_of_a_library(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}.".startswith(_LIBRARIES)


class Pairs:
    """The modules of a model and their twins in one shadow."""

    def __init__(self) -> None:
        self.twins: dict[nn.Module, nn.Module] = {}
        self.known: dict[nn.Module, dict[str, Any]] = {}  # attributes that the twins know of

    def add(self, module: nn.Module, twin: nn.Module) -> None:
        self.twins[module] = twin

    def remember(self) -> None:
        """Note what stands on the modules now: what is there later was written."""
        if not self.known:
            self.known = {module: _attributes(module) for module in self.twins}

    def take_over(self, modules: list[nn.Module]) -> list[nn.Module]:
        """Give the twins of these modules what was written on them; returns those on which something was."""
        return [module for module in modules if self._written_on(module)]

    def _written_on(self, module: nn.Module) -> bool:
        now, known, twin = _attributes(module), self.known[module], self.twins[module]
        written = {name: value for name, value in now.items() if known.get(name, known) is not value}
        for name, value in written.items():
            table: dict[str, Any] = twin._buffers if name in twin._buffers else vars(twin)
            table[name] = self.twins.get(value, value) if isinstance(value, nn.Module) else value
        self.known[module] = now
        return bool(written)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **module._buffers}


class UserHook:
    """One hook on one module of a shadow.

    Args:
        hook: the user's.
        module: the module of the model on which it is.
        table (`str`), key (`int`): where it stands there.
        pairs: of the shadow.
    """

    def __init__(self, hook: Callable[..., Any], module: nn.Module, table: str, key: int, pairs: Pairs):
        self.hook, self.module, self.table, self.key, self.pairs = hook, module, table, key, pairs
        self.writes_on: list[nn.Module] | None = None  # not known before the first call

    def __call__(self, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.pairs.remember()
        changed = self.hook(self.module, *args, **kwargs)
        if self.writes_on is None:
            self.writes_on = [self.module, *self.pairs.take_over(list(self.pairs.twins))]
        else:
            self.pairs.take_over(self.writes_on)
        if self.key not in getattr(self.module, self.table):  # it has removed itself
            getattr(twin, self.table).pop(self.key, None)
        return changed
