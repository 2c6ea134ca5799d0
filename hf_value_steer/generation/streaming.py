"""Handing tokens to a streamer, so that its reader is never left waiting, also if the call fails."""

from collections import deque
from types import TracebackType

from torch import Tensor
from transformers.generation import BaseStreamer


class Streaming(BaseStreamer):  # type: ignore[misc]
    """Hands tokens to a streamer, and ends it once: when the text ends, or when the `with` block is left by an error.

    Args:
        streamer (`BaseStreamer`, *optional*): that of the call; without it nothing is done.
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


class LaggingStream:
    """Hands tokens on once they cannot be taken back. The loop calls [`put`] once a step, and [`end`] at the end.

    Args:
        streamer: of the call. On an error it ends without the tokens that are still held back.
        lag (`int`): number of tokens that are held back.
    """

    def __init__(self, streamer: Streaming, lag: int):
        self.streamer, self.lag = streamer, lag
        self.held = deque[Tensor]()

    def put(self, tokens: Tensor) -> None:
        """Take in the token of each row, `(batch,)`."""
        self.held.append(tokens)
        while len(self.held) > self.lag:
            self.streamer.put(self.held.popleft())

    def rewrite(self, row: int, tokens: Tensor) -> None:
        """Put other tokens `(n,)` in the place of the last n of a row."""
        for ago, token in zip(range(len(tokens), 0, -1), tokens, strict=True):
            self.held[-ago] = self.held[-ago].clone()  # it is also part of the step's outcome
            self.held[-ago][row] = token

    def drop(self, count: int) -> None:
        """Forget the last tokens of all rows."""
        for _ in range(count):
            self.held.pop()

    def end(self) -> None:
        """Hand on what is held back, and end the stream."""
        while self.held:
            self.streamer.put(self.held.popleft())
        self.streamer.end()
