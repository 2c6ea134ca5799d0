"""A model again over the same weights, for one steered call: what is set on it is seen by nobody else.

A steered call has hooks, an attention function and classes of its own. Set on the model itself they would reach every
other call that runs at the same time. So it works on a *shadow*: new module objects with the same parameters and
buffers, and copies of whatever else on them refers to modules or configs, or is a list, a set or a dict. It is made
anew for every call and so knows of all that has changed since the last one. What a forward notes in Python on its
modules is the shadow's own, and goes with it.
"""

import copy
import functools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from hf_value_steer.backbone.user_hooks import Pairs, UserHook, is_of_a_library
from hf_value_steer.hosts.transformers import installing_hooks


_PLAIN = frozenset({int, float, bool, str, type(None), type, torch.Tensor, nn.Parameter, torch.device, torch.dtype})
_MAPPINGS = (dict, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_SETS = (set, weakref.WeakSet)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_TABLES = frozenset(name for name, table in vars(nn.Module()).items() if isinstance(table, dict | set))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# On the instance; they refer to the model, and are not called during a generation.
_GENERATES = ("generate", "_generate_before_value_steer")
_ASIDE = "_value_steer_aside"  # keeps alive what only weak references lead to

_Model = TypeVar("_Model", bound=nn.Module)


def shadow(model: _Model) -> _Model:
    """`model` again over the same tensors.

    Hooks that the user has registered run on the shadow, too, and are given the modules of `model` itself.
    """
    with installing_hooks:  # in another thread, transformers may be half through them
        return _Copies(model)[id(model)]  # type: ignore[no-any-return]


class _Copies(dict[int, Any]):
    """From the `id` of what was copied to its twin. Modules are filled after all of them are there: they refer to
    one another in cycles.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.empty: list[tuple[nn.Module, nn.Module]] = []
        self.weakly: list[nn.Module] = []
        self.pairs = Pairs()
        twin = self.of(model)
        while self.empty:
            self._fill(*self.empty.pop())
        if self.weakly:
            inside = set(map(id, twin.modules()))
            vars(twin)[_ASIDE] = [each for each in self.weakly if id(each) not in inside]

    def of(self, value: Any) -> Any:
        """The twin of `value`: the very same object, unless it is a module or a config, or refers to one."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if id(value) in self:
            return self[id(value)]
        if kind in _PROXIES:  # before `isinstance`, which asks what they stand for
            return self._proxy(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (*_MAPPINGS, *_SETS, list, deque, tuple, frozenset)):
            return self._container(value)
        if kind is types.MethodType:
            return self._method(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is functools.partial:
            return self._partial(value)
        if isinstance(value, weakref.ref):
            target = value()
            return weakref.ref(self._referred(target)) if isinstance(target, nn.Module) else value
        if isinstance(value, PreTrainedConfig | GenerationConfig) or _is_accelerate_hook(kind):
            return self._fields_of(value, object.__new__(kind))
        return value

    def _module(self, value: nn.Module) -> nn.Module:
        if isinstance(value, torch.jit.ScriptModule):
            return value
        twin: nn.Module = object.__new__(type(value))
        self[id(value)] = twin
        self.empty.append((value, twin))
        self.pairs.add(value, twin)
        return twin

    def _fill(self, value: nn.Module, twin: nn.Module) -> None:
        table = dict(vars(value))  # at once: other threads may write to it
        for name in _GENERATES:
            table.pop(name, None)
        for name, entry in table.items():
            # A parameter that is assigned later is seen by both, but not where `accelerate` loads them for a forward.
            if type(entry) in _PLAIN or (name == "_parameters" and "_hf_hook" not in table):
                continue
            if name not in _TABLES:
                table[name] = self._own(entry)
                continue
            table[name] = entry = entry.copy()
            if entry and isinstance(entry, dict):
                of = functools.partial(self._hook, value, name) if name in _HOOKS else self._entry
                entry.update([(key, of(key, one)) for key, one in entry.items()])
        object.__setattr__(twin, "__dict__", table)
        for name in _slots(type(value)):  # type: ignore[arg-type]
            if hasattr(value, name):
                object.__setattr__(twin, name, self.of(getattr(value, name)))

    def _own(self, value: Any) -> Any:
        """The twin of an attribute: a list, set or dict is copied in any case, since the forward may write to it."""
        fresh = type(value) not in _PROXIES and id(value) not in self
        if fresh and isinstance(value, (*_MAPPINGS, *_SETS, list, deque)):
            return self._refilled(value, self._own)
        return self.of(value)

    def _entry(self, _key: Any, one: Any) -> Any:
        return self.of(one)

    def _hook(self, module: nn.Module, table: str, key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook for the twin of `module`; one of the user's goes on being given `module` itself."""
        if is_of_a_library(hook):
            return self.of(hook)  # type: ignore[no-any-return]
        return UserHook(hook, module, table, key, self.pairs)

    def _method(self, value: types.MethodType) -> types.MethodType:
        owner, function = self.of(value.__self__), self.of(value.__func__)
        same = owner is value.__self__ and function is value.__func__
        return value if same else types.MethodType(function, owner)

    def _partial(self, value: functools.partial[Any]) -> Any:
        keywords = {name: self.of(entry) for name, entry in value.keywords.items()}
        return self._fields_of(value, functools.partial(self.of(value.func), *map(self.of, value.args), **keywords))

    def _referred(self, value: nn.Module) -> nn.Module:
        """The twin of what a weak reference leads to."""
        twin: nn.Module = self.of(value)
        self.weakly.append(twin)
        return twin

    def _proxy(self, value: Any) -> Any:
        try:
            target = value.__repr__.__self__
        except ReferenceError:  # it is gone
            return value
        return weakref.proxy(self._referred(target)) if isinstance(target, nn.Module) else value

    def _fields_of(self, value: Any, twin: Any) -> Any:
        self[id(value)] = twin
        for name, entry in dict(vars(value)).items():
            if name == "tied_params_map" and entry is not None and id(entry) not in self:  # of all offloading hooks
                self[id(entry)] = {key: dict(one) for key, one in list(entry.items())}
            vars(twin)[name] = self.of(entry)
        return twin

    def _container(self, value: Any) -> Any:
        """The same container, unless something in it has a twin."""
        self[id(value)] = value
        entries = (
            [part for pair in list(value.items()) for part in pair] if isinstance(value, _MAPPINGS) else list(value)
        )
        new = [self.of(entry) for entry in entries]
        if all(map(operator.is_, new, entries)):
            return value
        if isinstance(value, tuple | frozenset):
            twin = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
            self[id(value)] = twin
            return twin
        return self._refilled(value, self.of)

    def _refilled(self, value: Any, of: Callable[[Any], Any]) -> Any:
        """A container like `value`, with the twins of what it holds."""
        twin = self[id(value)] = copy.copy(value)
        twin.clear()
        if isinstance(value, _MAPPINGS):
            twin.update([(self.of(key), of(entry)) for key, entry in list(value.items())])
        elif isinstance(value, _SETS):
            twin.update([of(entry) for entry in list(value)])
        else:
            twin.extend([of(entry) for entry in list(value)])
        return twin

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A function whose closure or defaults hold what is copied; its other cells stay shared."""
        self[id(value)] = value
        cells, defaults, named = value.__closure__ or (), self.of(value.__defaults__), self.of(value.__kwdefaults__)
        closure = tuple(map(self._cell, cells))
        old = (value.__defaults__, value.__kwdefaults__, *cells)
        if all(map(operator.is_, (defaults, named, *closure), old)):
            return value
        twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure or None)
        twin.__kwdefaults__, twin.__qualname__ = named, value.__qualname__
        twin.__module__ = value.__module__
        return self._fields_of(value, twin)  # type: ignore[no-any-return]

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            twin = self.of(cell.cell_contents)
        except ValueError:  # still empty
            return cell
        return cell if twin is cell.cell_contents else types.CellType(twin)


@functools.cache
def _slots(kind: type) -> list[str]:
    """Names of attributes that are not in an instance's `__dict__`."""
    named = [getattr(base, "__slots__", ()) for base in kind.__mro__ if base.__module__ != "builtins"]
    return [name for names in named for name in ([names] if isinstance(names, str) else names) if name != "__dict__"]


def _is_accelerate_hook(kind: type) -> bool:
    """Whether this is a hook of `accelerate`, which keeps state during a forward."""
    return any(base.__name__ == "ModelHook" for base in kind.__mro__)
