"""A model again over the same weights, for one steered call: what is set on it is seen by nobody else.

A steered call has hooks, an attention function and classes of its own. Set on the model itself they would reach every
other call that runs at the same time. So it works on a *shadow*: new module objects with the parameters and buffers of
the model's, and copies of whatever else refers to modules or configs. It is made anew for every call, in about five
microseconds a module, and so knows of all that has changed since the last one.
"""

import copy
import functools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from hf_value_steer.hosts.transformers import installing_hooks


_PLAIN = frozenset({int, float, bool, str, type(None), type, torch.Tensor, nn.Parameter, torch.device, torch.dtype})
_CONTAINERS = (dict, list, tuple, set, frozenset)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_TABLES = frozenset(name for name, table in vars(nn.Module()).items() if isinstance(table, dict | set))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# These write on the module that they are given, for its own forward: they have to get the shadow's.
_OF_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.", "hf_value_steer.")
# On the instance; they refer to the model, and are not called during a generation.
_GENERATES = ("generate", "_generate_before_value_steer")

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
        self.of(model)
        while self.empty:
            self._fill(*self.empty.pop())

    def of(self, value: Any) -> Any:
        """The twin of `value`: the very same object, unless there is a module or a config inside."""
        kind = type(value)
        if kind in _PLAIN or id(value) in self:
            return self.get(id(value), value)
        if isinstance(value, nn.Module) and kind not in _PROXIES:
            return self._module(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if kind is types.MethodType:
            return self._method(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is functools.partial:
            return self._partial(value)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.of(value())) if isinstance(value(), nn.Module) else value
        if kind in _PROXIES:
            return weakref.proxy(self.of(value.__repr__.__self__))
        if isinstance(value, PreTrainedConfig | GenerationConfig) or _is_accelerate_hook(kind):
            return self._fields_of(value, object.__new__(kind))
        return value

    def _module(self, value: nn.Module) -> nn.Module:
        if isinstance(value, torch.jit.ScriptModule):
            return value
        twin: nn.Module = object.__new__(type(value))
        self[id(value)] = twin
        self.empty.append((value, twin))
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
                table[name] = self.of(entry)
                continue
            table[name] = entry = entry.copy()
            if entry and isinstance(entry, dict):
                entry.update(
                    [(key, self._hook(one, value) if name in _HOOKS else self.of(one)) for key, one in entry.items()]
                )
        object.__setattr__(twin, "__dict__", table)

    def _hook(self, hook: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        """A hook for the twin of `module`; one of the user's goes on being given `module` itself."""
        if _module_of(hook).startswith(_OF_LIBRARIES):
            return self.of(hook)  # type: ignore[no-any-return]
        return functools.partial(_call_with, hook, module)

    def _method(self, value: types.MethodType) -> types.MethodType:
        owner, function = self.of(value.__self__), self.of(value.__func__)
        same = owner is value.__self__ and function is value.__func__
        return value if same else types.MethodType(function, owner)

    def _partial(self, value: functools.partial[Any]) -> Any:
        keywords = {name: self.of(entry) for name, entry in value.keywords.items()}
        return self._fields_of(value, functools.partial(self.of(value.func), *map(self.of, value.args), **keywords))

    def _fields_of(self, value: Any, twin: Any) -> Any:
        self[id(value)] = twin
        for name, entry in dict(vars(value)).items():
            if name == "tied_params_map" and entry is not None and id(entry) not in self:  # of all offloading hooks
                self[id(entry)] = {key: dict(one) for key, one in list(entry.items())}
            vars(twin)[name] = self.of(entry)
        return twin

    def _container(self, value: Any) -> Any:
        self[id(value)] = value
        entries = [*value, *value.values()] if isinstance(value, dict) else list(value)
        new = [self.of(entry) for entry in entries]
        if all(map(operator.is_, new, entries)):
            return value
        if isinstance(value, dict):
            twin = copy.copy(value)
            twin.clear()
            twin.update(zip(new[: len(new) // 2], new[len(new) // 2 :], strict=True))
        else:
            twin = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        self[id(value)] = twin
        return twin

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A function whose closure or defaults hold what is copied; its other cells stay shared."""
        self[id(value)] = value
        cells, defaults = value.__closure__ or (), self.of(value.__defaults__)
        closure = tuple(map(self._cell, cells))
        if defaults is value.__defaults__ and all(map(operator.is_, closure, cells)):
            return value
        twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure or None)
        twin.__kwdefaults__, twin.__qualname__ = value.__kwdefaults__, value.__qualname__
        twin.__module__ = value.__module__
        return self._fields_of(value, twin)  # type: ignore[no-any-return]

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            twin = self.of(cell.cell_contents)
        except ValueError:  # still empty
            return cell
        return cell if twin is cell.cell_contents else types.CellType(twin)


def _is_accelerate_hook(kind: type) -> bool:
    """Whether this is a hook of `accelerate`, which keeps state during a forward."""
    return any(base.__name__ == "ModelHook" for base in kind.__mro__)


def _module_of(hook: Any) -> str:
    """Where a hook was written."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."


def _call_with(hook: Callable[..., Any], module: nn.Module, _twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return hook(module, *args, **kwargs)
