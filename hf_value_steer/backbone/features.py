"""What a value head reads of a model: the states of a token at one or several places, side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.parts import feature_width, num_layers, residual_width
from hf_value_steer.backbone.points import Point, feature_point, layer_points
from hf_value_steer.errors import MismatchError, ScoringError, UnsupportedError


FINAL: Literal["final"] = "final"
# A decoder layer, counted from 0, whose output is read; or what the output embedding consumes.
Layer: TypeAlias = int | Literal["final"]
ONLY_FINAL: tuple[Layer, ...] = (FINAL,)


class Features(dict[Layer, Tensor]):
    """The states at several layers, `(..., width)` each, by layer."""

    def of(self, layers: Sequence[Layer]) -> Tensor:
        """Those at `layers` side by side, `(..., sum of widths)`, on the device of the last of them.

        Raises:
            ScoringError: if the forward has not shown one of them.
        """
        if unseen := [layer for layer in layers if layer not in self]:
            raise ScoringError(
                f"The forward did not call the layers {unseen} that a head reads, or not where they can be watched: "
                "if layers were replaced or compiled since, begin anew."
            )
        if len(layers) == 1:
            return self[layers[0]]
        device = self[layers[-1]].device
        return torch.cat([self[layer].to(device) for layer in layers], dim=-1)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """What `function` makes of each of them."""
        return Features({layer: function(state) for layer, state in self.items()})


def resolve_layers(places: Iterable[int | float | str], model: PreTrainedModel) -> tuple[Layer, ...]:
    """The layers that a config means, in its order.

    Args:
        places: layers counted from 0, or with negative numbers from the end; fractions of the depth in [0, 1]; or
            `"final"`.
        model: the backbone.

    Raises:
        MismatchError: for a layer that the model does not have, and for one that is named twice.
    """
    places = list(places)
    return ONLY_FINAL if places == [FINAL] else layers_of(places, num_layers(model))


def layers_of(places: Iterable[int | float | str], depth: int) -> tuple[Layer, ...]:
    """The same for a model of `depth` layers."""
    places = list(places)
    layers = tuple(_resolved(place, depth) for place in places)
    if len(set(layers)) < len(layers):
        raise MismatchError(f"`feature_layers` {places} name a layer of these {depth} twice: {list(layers)}.")
    return layers


def _resolved(place: int | float | str, depth: int) -> Layer:
    if place == FINAL:
        return FINAL
    assert not isinstance(place, str)  # the config was checked
    layer = min(round(place * depth), depth - 1) if isinstance(place, float) else place
    if not -depth <= layer < depth:
        raise MismatchError(
            f"`feature_layers` name layer {layer}, but this model has {depth} layers, 0 to {depth - 1}. "
            'What transformers calls `hidden_states[l + 1]` is layer l, and its last one is "final".'
        )
    return layer % depth


def deepest(layers: Iterable[Layer]) -> Layer:
    """The one of them that a forward reaches last."""
    return max(layers, key=_order)


def _order(layer: Layer) -> float:
    """Forwards reach layers in this order."""
    return float("inf") if layer == FINAL else layer


def points_of(model: PreTrainedModel, layers: Iterable[Layer]) -> dict[Layer, Point]:
    """Where the states of these layers pass.

    Raises:
        UnsupportedError: for a layer of a model whose layers are not found.
    """
    layers = list(layers)
    if all(layer == FINAL for layer in layers):
        return dict.fromkeys(layers, feature_point(model))
    try:
        stack = layer_points(model)
    except ValueError as error:
        raise UnsupportedError(f"A head that reads layers cannot be used here: {error}") from error
    return {layer: feature_point(model) if layer == FINAL else stack[layer] for layer in layers}


def features_width(model: PreTrainedModel, layers: Iterable[Layer]) -> int:
    """Width of the states of these layers side by side."""
    return sum(feature_width(model) if layer == FINAL else residual_width(model) for layer in layers)


@contextmanager
def collected(
    model: PreTrainedModel, layers: Sequence[Layer], kept: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Features]]:
    """Inside the `with` block, the list gets the [`Features`] of every forward of `model` in this context.

    A forward has gone through all layers when its entry is complete.

    Args:
        kept (*optional*): from a state `(rows, positions, width)` to what is kept of it; all of it by default.
    """
    found: list[Features] = []
    first = min(layers, key=_order)

    def keep(layer: Layer, state: Tensor) -> None:
        if layer == first:
            found.append(Features())
        state = require_readable(layer, state)
        found[-1][layer] = state if kept is None else kept(state)

    with ExitStack() as stack:
        for layer, point in points_of(model, layers).items():
            stack.enter_context(point.watched(partial(keep, layer)))
        yield found


def require_readable(layer: Layer, state: Tensor) -> Tensor:
    """The `state` that has passed at `layer`, if it is `(rows, positions, width)`; what is final always is.

    Raises:
        UnsupportedError: for a model whose residual stream has another form.
    """
    if layer != FINAL and (not isinstance(state, Tensor) or state.dim() != 3):
        found = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise UnsupportedError(
            f"A head that reads layers cannot be used here: a layer should hand on (rows, positions, width), it gave "
            f"{found}."
        )
    return state
