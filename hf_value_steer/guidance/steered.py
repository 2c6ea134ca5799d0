"""One forward in which bridges stand beside the tokens, in the layers above l* only.

Up to and including l* the forward is that of the text alone. Before the layer above, the bridges made from the token's
own state are put in front of it; they and the token go through the upper layers together and all see each other and
the text so far, at the position of the token; after the last layer the token goes on alone. The keys and values of
bridges never enter the cache, which stays that of the text.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_value_steer.backbone.points import Point, named_arguments
from hf_value_steer.errors import ScoringError


@dataclass
class BridgeState:
    """What holds until the next refresh, for each row.

    Args:
        bridge (`torch.FloatTensor` of shape `(rows, K, width)`): as it enters the layer above l*.
        shown (`torch.BoolTensor` of shape `(rows,)`): whether tokens see it.
        values (`torch.FloatTensor` of shape `(rows,)`): value of the token that it was made from.
        keys, contents (`dict` of `torch.FloatTensor` of shape `(rows, heads, K, dim)`): by layer.
    """

    bridge: Tensor
    shown: Tensor
    values: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    contents: dict[int, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> "BridgeState":
        """The same with `function` applied to every tensor."""
        keys, contents = ({i: function(each) for i, each in kind.items()} for kind in (self.keys, self.contents))
        return BridgeState(function(self.bridge), function(self.shown), function(self.values), keys, contents)

    def to_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        kinds = [("keys", self.keys), ("contents", self.contents)]
        layers = {f"{name}.{layer}": tensor for name, kind in kinds for layer, tensor in kind.items()}
        return {"bridge": self.bridge, "shown": self.shown, "values": self.values, **layers}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> "BridgeState":
        """From what [`to_dict`] gives; other names do not matter."""
        state = cls(tensors["bridge"], tensors["shown"], tensors["values"])
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            if layer:
                getattr(state, kind)[int(layer)] = tensor
        return state

    def take(self, rows: Tensor) -> "BridgeState":
        """These rows, which may repeat."""
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])

    def put(self, rows: Tensor, other: "BridgeState") -> "BridgeState":
        """This with `rows` replaced by those of `other`, which holds as many."""
        merged = self.map(torch.clone)
        merged.bridge[rows], merged.shown[rows], merged.values[rows] = other.bridge, other.shown, other.values
        for mine, theirs in ((merged.keys, other.keys), (merged.contents, other.contents)):
            for index, tensor in theirs.items():
                mine.setdefault(index, torch.zeros_like(tensor[:1]).repeat(len(merged.shown), 1, 1, 1))
                mine[index][rows.to(tensor.device)] = tensor
        return merged


class _BridgedLayer:
    """Stands in for a cache layer during one forward: keeps the bridges' keys and values, passes on the token's."""

    def __init__(self, layer: Any, state: BridgeState, index: int, made: int):
        self.layer, self.state, self.index, self.made, self.updates = layer, state, index, made, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.made:
            self.state.keys[self.index] = keys[:, :, : self.made]
            self.state.contents[self.index] = values[:, :, : self.made]
        self.updates += keys.shape[2] == self.made + 1
        keys, values = self.layer.update(keys[:, :, self.made :], values[:, :, self.made :], *args, **kwargs)
        bridges = self.state.keys[self.index], self.state.contents[self.index]
        return torch.cat([keys, bridges[0]], dim=2), torch.cat([values, bridges[1]], dim=2)


# By identity and width of the mask that a layer was given, which is kept so that no other has its identity.
_Widened = dict[tuple[int, int], tuple[Tensor | None, Tensor]]


@contextmanager
def bridged(layers: nn.ModuleList, above: int, live: Cache, state: BridgeState, made: bool) -> Iterator[None]:
    """Show the bridges of `state` to the one token of each row that is on its way through the layers.

    Entered while the forward is below layer `above`, left after it.

    Args:
        layers: decoder layers of the model.
        above (`int`): the first layer in which bridges exist.
        live: the cache of the forward.
        state: its `bridge` and `shown` are read; its keys and values are read or, with `made`, written.
        made (`bool`): whether the bridges go through the layers in this forward.

    Raises:
        ScoringError: if a layer did not take the bridges in, so that the token was not steered.
    """
    count = state.bridge.shape[1]
    new = count if made else 0
    stand_ins = [_BridgedLayer(live.layers[i], state, i, new) for i in range(above, len(layers))]
    everyone = bool(state.shown.all())
    widened: _Widened = {}
    handles = [
        layer.register_forward_pre_hook(partial(_widen, state, new, everyone, widened, stand_ins[i]), with_kwargs=True)
        for i, layer in enumerate(layers[above:])
    ]
    inner, live.layers = live.layers, [*live.layers[:above], *stand_ins, *live.layers[len(layers) :]]
    try:
        with Point(layers[-1], "output").watched(lambda hidden: hidden[:, new:]):
            yield
    finally:
        live.layers = inner
        for handle in handles:
            handle.remove()
    if any(layer.updates != 1 for layer in stand_ins):
        raise ScoringError("A layer did not take in the bridge tokens: this model cannot be guided.")


def _widen(
    state: BridgeState,
    new: int,
    everyone: bool,
    widened: _Widened,
    cache: _BridgedLayer,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:
    """The arguments of an upper layer, with the bridges in front of the token in the first, and columns for them.

    Without padding, where `everyone` sees its bridges, no mask is needed, only that attention is not causal.
    `widened` holds the masks that were made for the layers below, most of which share one.
    """
    given = named_arguments(layer, args, kwargs)
    hidden = given["hidden_states"]
    if new and hidden.shape[1] == 1:
        given["hidden_states"] = hidden = torch.cat([state.bridge.to(hidden), hidden], dim=1)
    mask = given["attention_mask"]
    if mask is None and everyone:
        return (), {**given, "is_causal": False}
    length = cache.layer.get_mask_sizes(1)[0]
    if (id(mask), length) not in widened:
        own = torch.ones(1, 1, 1, length, dtype=torch.bool, device=hidden.device) if mask is None else mask
        shown = state.shown.to(hidden.device)
        widened[id(mask), length] = mask, _with_bridges(own, shown, state.bridge.shape[1], new + 1)
    given["attention_mask"] = widened[id(mask), length][1]
    return (), given


def _with_bridges(mask: Tensor, shown: Tensor, count: int, queries: int) -> Tensor:
    """From the mask of the token, `(rows, 1, 1, length)`, to that of all queries, `(rows, 1, queries, length + K)`."""
    rows = len(shown)
    columns = shown[:, None, None, None].expand(rows, 1, 1, count)
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill(~columns, hidden)
    wide = torch.cat([mask[:, :, -1:].expand(rows, -1, -1, -1), columns], dim=-1)
    return wide.expand(-1, -1, queries, -1)
