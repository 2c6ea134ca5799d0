"""A streamer whose reader is released, whatever happens to the call that writes to it."""

from types import TracebackType

from torch import Tensor
from transformers.generation import BaseStreamer


class Streaming(BaseStreamer):  # type: ignore[misc]
    """Hands tokens on, and ends the streamer once: when the text ends, or when the `with` block is left by an error.

    Args:
        streamer (`BaseStreamer`, *optional*): whose reader waits; nobody does if it is `None`.
    """

    def __init__(self, streamer: BaseStreamer | None):
        self.streamer, self.ended = streamer, streamer is None

    def put(self, value: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(value.cpu())

    def end(self) -> None:
        if self.streamer is not None and not self.ended:
            self.ended = True
            self.streamer.end()

    def __enter__(self) -> "Streaming":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end()


def streaming(streamer: BaseStreamer | None) -> Streaming:
    """`streamer` as one that is always ended."""
    return streamer if isinstance(streamer, Streaming) else Streaming(streamer)
