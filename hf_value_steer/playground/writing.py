"""From a prompt to two texts, token by token. Knows nothing of the page that shows them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.evaluation.trace import Colours
from hf_value_steer.evaluation.watching import Side, Watch, write
from hf_value_steer.generation.scorer import require_fit
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.playground.settings import Settings
from hf_value_steer.training.prompts import Formatter


@dataclass
class Turn:
    """One prompt and its two texts, as far as they are written; `colours` are known from the first token on."""

    prompt: str
    base: Side = field(default_factory=lambda: Side("base"))
    steered: Side = field(default_factory=lambda: Side("steered"))
    colours: Colours | None = None


class _Stopped(Exception):
    """Nobody wants the rest of the text."""


class Writer:
    """A model with a head, and perhaps vectors, that writes one pair of texts at a time.

    Args:
        model, tokenizer: the backbone.
        head: values its texts.
        vectors (*optional*): are added to its residual stream.

    Raises:
        ValueError: if head or vectors do not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: ValueHead,
        vectors: SteeringVectors | None = None,
    ):
        require_fit(head, model)
        if vectors is not None:
            vectors.check_fit(model)
        self.model, self.tokenizer, self.head, self.vectors = model, tokenizer, head, vectors
        self.alone = Lock()  # all calls draw from PyTorch's global generator, which the seed is set of
        self.closed = Event()

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.tokenizer.chat_template is not None

    def write(self, prompt: str, settings: Settings, past: Sequence[Turn] = ()) -> Iterator[Turn]:
        """Both texts, as far as they are written: the same object again whenever there is more of it.

        A generator that is closed before its end stops the model.

        Args:
            prompt (`str`): a text to continue, or a message to answer.
            settings: what the controls say.
            past (sequence of [`Turn`]): of a chat, what was said before. Each side goes on with its own answers.

        Raises:
            ValueError: for an empty prompt, and for settings that cannot be.
        """
        if not prompt.strip():
            raise ValueError("There is no prompt: write a text to continue, or a message to answer.")
        turn, news, stop = Turn(prompt), Event(), Event()
        watch = Watch(settings.valued(self.head), self.tokenizer)

        def stopped() -> bool:
            return stop.is_set() or self.closed.is_set()

        def show(_: Side) -> None:
            turn.colours = watch.colours
            news.set()
            if stopped():
                raise _Stopped

        watch.show = show
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(self._both, turn, watch, settings, past, stopped)
            writing.add_done_callback(lambda _: news.set())
            try:
                while not writing.done():
                    news.wait()
                    news.clear()
                    yield turn
            finally:
                stop.set()
        writing.result()
        yield turn

    def close(self) -> None:
        """Stop whatever is written, for good."""
        self.closed.set()

    def _both(
        self, turn: Turn, watch: Watch, settings: Settings, past: Sequence[Turn], stopped: Callable[[], bool]
    ) -> None:
        """Write the base's text, and then the steered one."""
        valued = settings.valued(self.head)
        steering = [valued, *settings.added(self.vectors)]
        with self.alone:
            for side, methods in ((turn.base, []), (turn.steered, steering)):
                if stopped():
                    return
                said = [(each.prompt, getattr(each, side.name)) for each in past]
                inputs = self._inputs(turn.prompt, settings.chat, said)
                try:
                    write(side, methods, watch, self.model, inputs, settings.seed, **settings.options())
                except _Stopped:
                    return

    def _inputs(self, prompt: str, chat: bool, said: Sequence[tuple[str, Side]]) -> Mapping[str, torch.Tensor]:
        """What the model reads of one side."""
        messages: list[dict[str, str]] = []
        for earlier, side in said if chat else ():
            messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": self._answer(side)}]
        messages.append({"role": "user", "content": prompt})
        asked = Prompt(prompt, messages=messages)
        inputs: Mapping[str, torch.Tensor] = Formatter(self.tokenizer, chat)([asked], self.model.device)
        return inputs

    def _answer(self, side: Side) -> str:
        """A text without special tokens."""
        return "".join(each.text for each in side.tokens if each.text not in self.tokenizer.all_special_tokens)
