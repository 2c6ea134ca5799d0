"""Where the states of a model can be read and replaced: its output embedding, its decoder layers, and its call.

A model may be used by several threads at once. So what is attached to it for the time of a `with` block acts only in
the *context* (thread or asyncio task) that is in the block: [`Here`] tells. On a shadow
([`hf_value_steer.backbone.shadow`]), which belongs to one call, nothing has to be told apart.

A point is watched by giving its module a subclass of its own class, not by a forward hook: `torch.compile` guards the
classes of modules but not their hooks, so a graph that was compiled before would run on unwatched.
"""

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_value_steer.backbone.parts import decoder_layers, output_embedding


# From a state to what goes on in its place, `None` to leave it.
Watcher = Callable[[Tensor], Tensor | None]

_TABLE = "_value_steer_watchers"  # in a module's `__dict__`: a tuple of watchers
_STAND_IN = "_value_steer_stand_in"  # in a module's `__dict__`: what is called with its forward, and the arguments
_WATCHED = "_value_steer_watched"  # in the `__dict__` of a class that was made here
_blocks: ContextVar[frozenset["Here"]] = ContextVar("blocks that this context is in", default=frozenset())


class Here:
    """A `with` block, which is asked from anywhere whether the current thread or task is in it."""

    def __call__(self) -> bool:
        return self in _blocks.get()

    def __enter__(self) -> "Here":
        _blocks.set(_blocks.get() | {self})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _blocks.set(_blocks.get() - {self})


class _Changes:
    """Changes of tables, one at a time.

    The garbage collector may run in the middle of one, and what it finalises may want another one in the same thread:
    that one is made after it.
    """

    def __init__(self) -> None:
        self.lock, self.owner, self.later = threading.RLock(), 0, deque[Callable[[], None]]()

    def make(self, change: Callable[[], None]) -> None:
        if self.owner == threading.get_ident():
            self.later.append(change)
            return
        with self.lock:
            self.owner = threading.get_ident()
            try:
                change()
                while self.later:
                    self.later.popleft()()
            finally:
                self.owner = 0


_changes = _Changes()


@dataclass(frozen=True)
class Point:
    """One place in a model that states pass.

    Args:
        module: the module that is watched.
        side (`str`): whether the state is its `"input"` or its `"output"` (or the first of a tuple of outputs).
    """

    module: nn.Module
    side: Literal["input", "output"]

    def attach(self, watcher: Watcher, first: bool = False) -> Callable[[], None]:
        """Call `watcher` with every state that passes, in every thread; returns what takes it off again.

        States are `(rows, positions, width)`. Several watchers see them in the order in which they came, each what
        the one before has made of them. One that is `first` changes states, and is put in front of those that are
        there and may read them.
        """
        _changes.make(partial(self._attach, watcher, first))
        return partial(_changes.make, partial(self._detach, watcher))

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """Those that are attached now."""
        return vars(self.module).get(_TABLE, ())  # type: ignore[no-any-return]

    def _attach(self, watcher: Watcher, first: bool) -> None:
        # In this order, and whatever is there: another thread may make a shadow of the module in the middle of it.
        _open(self.module, self.side)
        vars(self.module)[_TABLE] = (watcher, *self.watchers) if first else (*self.watchers, watcher)

    def _detach(self, watcher: Watcher) -> None:
        if watcher not in self.watchers:
            return
        rest = tuple(other for other in self.watchers if other is not watcher)
        vars(self.module)[_TABLE] = rest
        if not rest:
            _close(self.module)
            del vars(self.module)[_TABLE]

    def open(self) -> None:
        """Let states that pass reach watchers, for good: on a shadow, whose watchers then cost next to nothing."""
        _open(self.module, self.side)

    @contextmanager
    def shown_to(self, watcher: Watcher) -> Iterator[None]:
        """Call `watcher` with the states that pass inside the `with` block. The point has to be open."""
        own, before = vars(self.module), self.watchers
        own[_TABLE] = (*before, watcher)
        try:
            yield
        finally:
            own[_TABLE] = before

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Call `watcher` with the states that pass inside the `with` block, in this context only."""
        with Here() as here:
            detach = self.attach(lambda state: watcher(state) if here() else None)
            try:
                yield
            finally:
                detach()


@contextmanager
def standing_in(points: Sequence[Point], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Call `stand_in(forward, *args, **kwargs)` in the place of the modules of open points, inside the `with` block.

    Watchers see what `forward` returns, where `stand_in` calls it, and not what `stand_in` returns.
    """
    tables = [vars(point.module) for point in points]
    before = [table.get(_STAND_IN) for table in tables]
    for table in tables:
        table[_STAND_IN] = stand_in
    try:
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table[_STAND_IN] = own


def feature_point(model: PreTrainedModel) -> Point:
    """Where the feature passes: what the output embedding consumes.

    A watcher that returns something is how a look-ahead hands over the chosen candidate alone: logits are computed by
    the model itself (scaling and soft-capping included), for one position instead of K.
    """
    return Point(output_embedding(model), "input")


def layer_points(model: PreTrainedModel) -> list[Point]:
    """Where the output of each decoder layer passes: that of layer `l`, counted from 0, is `hidden_states[l + 1]`."""
    return [Point(layer, "output") for layer in decoder_layers(model)]


def layer_point(model: PreTrainedModel, layer: int) -> Point:
    """One of [`layer_points`]. For several, ask for all at once: finding the layers looks at every module."""
    return layer_points(model)[layer]


def on_call(model: PreTrainedModel, watcher: Callable[[nn.Module, dict[str, Any]], None]) -> Callable[[], None]:
    """Call `watcher` with the arguments of every forward of `model`, by name; returns what takes it off again.

    Copies of the model and its shadows take it along: it is told which one runs.
    """
    names = _names(type(model).forward)

    # Taken off in one thread, it may be called once more in another, then without `kwargs`.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None:
            watcher(module, dict(zip(names, args, strict=False)) | kwargs)

    handle: RemovableHandle = model.register_forward_pre_hook(before, with_kwargs=True)
    return handle.remove


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name."""
    return dict(zip(_names(type(module).forward), args, strict=False)) | kwargs


@cache
def _names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _open(module: nn.Module, side: str) -> None:
    """Let states that pass `module` reach its watchers, unless they do."""
    own = vars(module).get("forward")
    if _is_open(module, own):
        return
    if own is None:
        module.__class__ = _watched_class(type(module), side)  # type: ignore[arg-type]
    else:  # `accelerate` has put a forward on the instance, which the class's would not reach
        vars(module)["forward"] = partial(_forward, side, module, own)


def _is_open(module: nn.Module, own: Any) -> bool:
    return own.func is _forward if isinstance(own, partial) else own is None and _WATCHED in vars(type(module))


def _close(module: nn.Module) -> None:
    own = vars(module).get("forward")
    if not _is_open(module, own):
        return
    if own is not None:
        vars(module)["forward"] = own.args[2]
    else:
        module.__class__ = type(module).__base__  # type: ignore[assignment]


@cache
def _watched_class(kind: type[nn.Module], side: str) -> type[nn.Module]:
    """`kind`, whose instances show their states to their watchers."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(side, self, partial(kind.forward, self), *args, **kwargs)

    own = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__, _WATCHED: True}
    return type(kind.__name__, (kind,), own)


def _forward(side: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if (stand_in := vars(module).get(_STAND_IN)) is not None:
        return stand_in(partial(_run, side, module, forward), *args, **kwargs)
    return _run(side, module, forward, *args, **kwargs)


def _run(side: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if side == "input":
        return forward(_shown(module, args[0]), *args[1:], **kwargs)
    output = forward(*args, **kwargs)
    if isinstance(output, tuple):
        return (_shown(module, output[0]), *output[1:])
    return _shown(module, output)


def _shown(module: nn.Module, state: Any) -> Any:
    """`state`, or what the watchers of `module` put in its place."""
    for watcher in vars(module).get(_TABLE, ()):
        changed = watcher(state)
        state = state if changed is None else changed
    return state
