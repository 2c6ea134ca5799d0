"""The forward passes of one row alone, which goes back and on while the other rows of the batch wait."""

from hf_value_steer.generation.engine import Around, Engine
from hf_value_steer.generation.kernels import Padding, begin_of_rows
from hf_value_steer.generation.row_cache import RowCache
from hf_value_steer.hosts.transformers import cache_name


class RowEngine(Engine):
    """An engine whose batch is one row of another one's, between two of its steps. Nothing of it is compiled.

    A search says by [`at`] which token comes next, and forwards it as in an ordinary step.

    Args:
        batch ([`Engine`]): of all rows.
        row (`int`): of the batch.
        around: what the methods of this row do around each forward.
    """

    def __init__(self, batch: Engine, row: int, around: Around):
        vars(self).update(vars(batch))  # model, points, adapters: those of the call
        self.batch, self.around, self.padding = batch, around, Padding()
        self.live: RowCache = RowCache(batch.live, row)
        forwards, self.kernel, self.at_depth = batch.uncompiled
        self.step_forwards, self.look_forwards, self.graph = forwards, forwards, None

    def at(self, length: int) -> None:
        """The next token is the last one of a text of `length` tokens."""
        kwargs = self.batch.model_kwargs
        self.model_kwargs = begin_of_rows(kwargs, self.live.row, length) | {cache_name(kwargs): self.live.cache}
