"""PEFT's `adapter_names`: an adapter for each row, also in a forward of some rows or of several candidates of each.

PEFT gives each of its layers the names of the whole batch, by a hook that holds them. A forward of other rows needs
other names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def unmerge_what_is_off(model: PreTrainedModel) -> None:
    """Take adapters that are merged and switched off out of the weights, as PEFT does in the next forward.

    PEFT notes on a module what it has done to its weights. If a shadow did it, the weights would change for the model,
    too, as they are shared, but the note would be on the shadow alone. Called before the shadow is made.
    """
    for module in model.modules():
        if getattr(module, "disable_adapters", False) and getattr(module, "merged", False):
            module.unmerge()


class AdaptersOfRows:
    """Gives the layers of a shadow the names of the rows that a forward reads.

    It puts a hook of its own in the place of PEFT's. The engine enters [`reading`] around each forward that does not
    read the batch as it is: inside, every row of that forward has the name of the row that it stands for.

    Args:
        model: a shadow, which belongs to one call.
    """

    def __init__(self, model: PreTrainedModel):
        self.names: list[str] = []
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                names = getattr(hook, "keywords", {}).get("adapter_names")
                if names is not None:
                    self.names = list(names)
                    module._forward_pre_hooks[key] = partial(self._give, adapter_names=self.names)
        self.present = self.names

    @contextmanager
    def reading(self, rows: Tensor | None, copies: int) -> Iterator[None]:
        """A forward inside the `with` block has `copies` batch rows for each of `rows`; `None` means all rows.

        Blocks nest: the rows of an inner one are counted in the outer one.
        """
        outer = self.present
        chosen = range(len(outer)) if rows is None or not outer else rows.tolist()
        self.present = [outer[row] for row in chosen for _ in range(copies)]
        try:
            yield
        finally:
            self.present = outer

    def _give(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **_: Any
    ) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.present}
