"""Position embeddings that follow the longest row of a forward: rope of type "longrope" and "dynamic".

Their frequencies depend on the largest position that a forward reads. A look-ahead in some rows does not read the
longest row, and would embed positions in another way than the step of the whole batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LongestRow:
    """Embeds the positions of some rows as a forward of all rows would.

    The engine enters [`reaching`] around forwards of some rows, with the positions of the whole batch.

    Args:
        model: a shadow, which belongs to one call.
    """

    def __init__(self, model: PreTrainedModel):
        self.modules = [module for module in model.modules() if _follows(getattr(module, "rope_type", None))]
        for module in self.modules:  # a shadow shares buffers with its model, and these modules write into them
            module._buffers = {name: None if each is None else each.clone() for name, each in module._buffers.items()}

    @contextmanager
    def reaching(self, positions: Tensor | None) -> Iterator[None]:
        """Inside the `with` block a forward embeds as if it also read the largest of `positions`."""
        handles = []
        if positions is not None and self.modules:
            before = partial(_add_position, positions.max())
            for module in self.modules:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(_drop_position))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _follows(kind: str | Mapping[str, str] | None) -> bool:
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return any(each is not None and ("dynamic" in each or each == "longrope") for each in kinds)


def _add_position(
    largest: Tensor, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = "position_ids" in kwargs
    positions = kwargs["position_ids"] if named else args[1]
    positions = torch.cat([positions, largest.to(positions).expand(*positions.shape[:-1], 1)], dim=-1)
    if named:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs


def _drop_position(_module: nn.Module, _args: tuple[Any, ...], embedded: Any) -> Any:
    if isinstance(embedded, tuple):
        return tuple(each[..., :-1, :] for each in embedded)
    return embedded[..., :-1, :]
