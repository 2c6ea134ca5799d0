"""One forward of the backbone, in two parts: through its layers to the feature, and from there to the logits.

Between the two parts nothing runs. There tokens are judged and replaced, in code that reads from top to bottom, and
the output embedding is computed once, for what was kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.features import FINAL, Features, Layer, require_readable
from hf_value_steer.backbone.parts import layer_stack
from hf_value_steer.backbone.points import Point, Watcher, feature_point, standing_in
from hf_value_steer.backbone.user_hooks import UserHook
from hf_value_steer.errors import ScoringError


Points: TypeAlias = Mapping[Layer, Point]


@dataclass
class Reached:
    """What a forward has left at the feature.

    Args:
        features ([`Features`]): the states of all tokens at the layers that are read, `(rows, positions, width)` each;
            `"final"` is among them, what the output embedding consumes.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in the model's output.
        forwards (*optional*): by what it was reached, and is gone on from.
        logits (`torch.FloatTensor` of shape `(rows, positions, vocab)`, *optional*): where the forward
            was not left there.
        handed_on (`torch.FloatTensor` of shape `(rows, positions, width)`, *optional*): where the forward was stopped
            at a layer, the state with which the layers above go on.
        rest (*optional*): what else is gone on from.
    """

    features: Features
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    forwards: "Forwards | None" = None
    logits: Tensor | None = None
    handed_on: Tensor | None = None
    rest: Any = None

    def compute_logits(self) -> Tensor:
        """Logits `(rows, positions, vocab)` of the feature, or those that are there already."""
        if self.logits is not None:
            return self.logits
        assert self.forwards is not None  # or the logits are there
        return self.forwards.resume_from(self)

    def keep(self, rows: Tensor, count: int) -> None:
        """Forget all rows but these `(n,)`, and all positions but `count`, after an undivided forward."""
        assert self.logits is not None
        self.logits = self.logits[rows, :count]
        self.features = self.features.each(lambda states: states[rows, :count])
        for name in ("hidden_states", "attentions"):
            if (states := getattr(self, name)) is not None:
                setattr(self, name, tuple(each[rows] for each in states))

    def put(self, rows: Tensor, keep: Tensor, other: "Reached") -> None:
        """Overwrite rows `rows[keep]` by those of `other`, which has a row for each of `rows` `(n,)`."""
        pairs = [(mine, other.features[layer]) for layer, mine in self.features.items()]
        if self.handed_on is not None and other.handed_on is not None:
            pairs.append((self.handed_on, other.handed_on))
        if self.logits is not None:
            pairs.append((self.logits, other.compute_logits()))
        pairs += zip(self.hidden_states or (), other.hidden_states or (), strict=True)
        for mine, theirs in zip(self.attentions or (), other.attentions or (), strict=True):
            # A static cache's slots that hold nothing have weights, too, in an ordinary step.
            pairs.append((mine, nn.functional.pad(theirs, (0, mine.shape[-1] - theirs.shape[-1]))))
        for mine, theirs in pairs:  # which may be on several devices
            mine[rows[keep].to(mine.device)] = theirs[keep.to(theirs.device)].to(mine.dtype)


class Forwards(Protocol):
    """How the engine runs the backbone: [`run_to`] takes arguments of a forward, [`resume_from`] gives logits."""

    def run_to(self, points: Points, inputs: dict[str, Any]) -> Reached:
        """Run the forward with these arguments as far as the output embedding, and read what passes `points`."""

    def resume_from(self, reached: Reached) -> Tensor:
        """Logits `(rows, positions, vocab)` of what `reached` holds now: others may have been put into some rows."""


def choose_forwards(model: PreTrainedModel) -> Forwards:
    """[`Split`], or [`Undivided`] where it is not certain that a forward can be left in the middle."""
    split = Split(model)
    stack, head = split.stack.module, split.point.module
    ours = all(type(each).__module__.startswith("transformers.") for each in (model, stack))
    compiled = any(map(is_compiled, (model, stack)))
    plain = all(map(is_plain, head.parameters()))
    # The output embedding is called in both parts, once without a position: its hooks run as they are.
    inside = {*stack.modules(), *head.modules()} - {stack}
    outside = (each for each in model.modules() if each not in inside)
    return split if ours and plain and not compiled and not any_hooked(outside) else Undivided(model)


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is an ordinary tensor: a product with one that is sharded or quantised may want a position."""
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor


def is_compiled(module: nn.Module) -> bool:
    """Whether the user has compiled it: a graph does not see that a module is stood in for."""
    return hasattr(module.forward, "_torchdynamo_orig_callable") or module._compiled_call_impl is not None


def any_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of the user runs before or after one of them."""
    tables = (table for each in modules for table in (each._forward_pre_hooks, each._forward_hooks))
    return any(isinstance(hook, UserHook) for table in tables for hook in table.values())


class Split:
    """Leaves the forward at the feature ([`run_to`]), and enters it there again ([`resume_from`]).

    It is left by handing no position on to the output embedding: so the model itself ends its forward, and hidden
    states and attentions are in its output. It is entered by a second forward in which the layers are stood in for by
    what they have returned in the first: whatever a family does behind its output embedding is done.

    Args:
        model: a shadow, which belongs to one call.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.point, self.stack = model, feature_point(model), Point(layer_stack(model), "output")
        for point in (self.point, self.stack):
            point.open()

    def run_to(self, points: Points, inputs: dict[str, Any]) -> Reached:
        stand_in = _StandIn()
        with reading(points) as features, self.point.shown_to(leave), standing_in([self.stack], stand_in):
            outputs = self.model(**{**inputs, "return_dict": True})
        return _reached(self, features, outputs, rest=(inputs, stand_in))

    def resume_from(self, reached: Reached) -> Tensor:
        inputs, stand_in = reached.rest
        with self.point.shown_to(lambda _: reached.features[FINAL]), standing_in([self.stack], stand_in):
            logits: Tensor = self.model(**{**inputs, "return_dict": True}).logits
        return logits


class Undivided:
    """Runs the whole forward: [`run_to`] computes logits of every position, and [`resume_from`] returns them."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        feature_point(model).open()

    def run_to(self, points: Points, inputs: dict[str, Any]) -> Reached:
        with reading(points) as features:
            outputs = self.model(**{**inputs, "return_dict": True})
        return _reached(self, features, outputs, outputs.logits)

    def resume_from(self, reached: Reached) -> Tensor:
        assert reached.logits is not None  # as it was run as a whole
        return reached.logits


def leave(feature: Tensor) -> Tensor:
    """No position goes on to the output embedding."""
    return feature[:, :0]


def _reached(
    forwards: Forwards, features: Features, outputs: ModelOutput, logits: Tensor | None = None, rest: Any = None
) -> Reached:
    states = (outputs.get("hidden_states"), outputs.get("attentions"))
    return Reached(require_all(features), *states, forwards, logits, rest=rest)


class Outer:
    """A forward inside which others run: its watchers let their states pass."""

    resting = False

    def unless_paused(self, watcher: Watcher) -> Watcher:
        """`watcher`, which is not shown what passes in the others."""
        return lambda state: None if self.resting else watcher(state)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Others run inside the `with` block."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False


@contextmanager
def reading(points: Points, outer: Outer | None = None) -> Iterator[Features]:
    """Keep what passes `points` in the forward inside the `with` block; of several forwards, of the last one.

    Args:
        outer (*optional*): knows when other forwards run inside this one, which are not read.
    """
    features = Features()
    with ExitStack() as stack:
        for layer, point in points.items():
            reader = _Reader(features, layer)
            stack.enter_context(point.shown_to(reader if outer is None else outer.unless_paused(reader)))
        yield features


class _Reader:
    """A watcher that keeps the last state that passed."""

    def __init__(self, features: Features, layer: Layer):
        self.features, self.layer = features, layer

    def __call__(self, state: Tensor) -> None:
        self.features[self.layer] = require_readable(self.layer, state)


def require_all(features: Features) -> Features:
    """The features of a forward, without positions that are no tokens: bridges stand in front of one."""
    if FINAL not in features:
        raise ScoringError(
            "The output embedding was called where it cannot be watched: if `model.forward` was compiled, compile "
            "it anew, and steer with it before anything else runs."
        )
    tokens = features[FINAL].shape[1]
    return features.each(lambda state: state[:, -tokens:])


class _StandIn:
    """Returns what a module returned the first time, without running it again."""

    output: Any = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.output = forward(*args, **kwargs)
        return self.output
