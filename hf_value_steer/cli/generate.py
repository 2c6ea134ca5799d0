"""`generate`: a prompt continued in the terminal, base beside steered, every token coloured by its value."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_value_steer.arguments.steer import GenerateArguments
from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.configuration.parse import parse_configs
from hf_value_steer.evaluation.trace import Colours, Pieces, TokenTrace
from hf_value_steer.files.kept import given_or_loaded
from hf_value_steer.generate import enable_value_steer
from hf_value_steer.generation.method import Call, Method, Moment
from hf_value_steer.generation.scorer import Scorer, bind, load_head
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, Prompt


# Of the six levels of [`Colours`], as on pages.
STYLES = ("", "black on #fdf5dc", "black on #fbdf98", "black on #f5a742", "black on #de6f1b", "white on #7a2a08")
REPLACED = "bold underline"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # and directions
WIDE = 80  # columns of a terminal that two texts fit in side by side


@dataclass
class Side:
    """One of the two texts, as far as it is written."""

    name: str
    tokens: list[TokenTrace] = field(default_factory=list)
    ended: bool = False


def generate(arguments: GenerateArguments) -> None:
    """Write both texts, token by token, and then what the values were."""
    logging.disable_progress_bar()
    methods = parse_configs(arguments.configuration())
    asked = [methods[name] for name in sorted(methods, key=lambda name: name != "filter")]  # who replaces comes first
    valued = next((each for each in asked if isinstance(each, SteeringConfig) and each.value_head is not None), None)
    head = None if valued is None else given_or_loaded(ValueHead.from_pretrained, valued.value_head)
    model, tokenizer = load_backbone(_backbone(arguments, head), arguments.dtype, PartialState().device)
    enable_value_steer(model)
    trained = head is not None and head.config.chat_template not in (None, "none")
    formatter = Formatter(tokenizer, trained if arguments.chat is None else arguments.chat)
    inputs = formatter([Prompt(arguments.prompt)], model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("The prompt has no tokens: this tokenizer begins no text by itself.")
    options = {**arguments.sampling(), "max_new_tokens": arguments.max_new_tokens, "return_dict_in_generate": True}
    sides = [Side("base"), Side("steered")]
    watch = Watch(valued, tokenizer)
    with Screen(sides, watch, arguments.color) as screen:
        for side, steering in zip(sides, ([], asked), strict=True):
            watch.side, watch.show = side, screen.show
            torch.manual_seed(arguments.seed)
            output = model.generate(**inputs, **options, value_steer=[*steering, watch])
            side.ended = bool(output.abstained.any())
            screen.finish()


def _backbone(arguments: GenerateArguments, head: ValueHead | None) -> str:
    named = arguments.model or (head and head.config.backbone)
    if not named:
        raise ValueError("Pass --model: the head names no backbone.")
    return str(named)


class Watch(Method):
    """A method that changes nothing: it shows each token, and its value if a head is there.

    Args:
        config (*optional*): names the head, and the threshold that values are compared with.
        tokenizer: of the backbone.

    Attributes:
        side: the text that is written.
        show: called after each token of it.
    """

    method = "watch"

    def __init__(self, config: SteeringConfig | None, tokenizer: PreTrainedTokenizerBase):
        self.config, self.pieces = config, Pieces(tokenizer)
        self.scorer: Scorer | None = None
        self.side = Side("")
        self.show: Callable[[Side], None] = lambda _: None

    def bind(self, call: Call) -> Sequence[Method]:
        if self.config is not None:
            self.scorer = bind(self.config, load_head(self.config, call.model), call.rows, call.device)
        return [self]

    def values(self, features: torch.Tensor) -> torch.Tensor:
        assert self.scorer is not None  # or nobody asks
        return self.scorer.values(features)

    def observe(self, moment: Moment) -> None:
        value = math.nan if self.scorer is None else float(moment.values_of(self))
        if moment.draw is None or moment.outcome is None:
            if self.scorer is not None:
                self.scorer.start(moment.values_of(self))
            return
        token, natural = int(moment.outcome.tokens), int(moment.draw.tokens)
        text = self.pieces(moment.draw.input_ids[0].tolist(), token)
        self.side.tokens.append(TokenTrace(text, value, token != natural))
        self.show(self.side)

    @property
    def colours(self) -> Colours | None:
        """Of values, relative to the threshold of the call."""
        return None if self.scorer is None else Colours(float(self.scorer.threshold), self.scorer.polarity)


class Screen:
    """Shows two texts while they are written: side by side, or, where there is no room or no terminal, one by one.

    Args:
        sides: the texts.
        watch: knows the colours.
        colour (`bool`): whether the user wants colours. Without them, replaced tokens stand in brackets.
    """

    def __init__(self, sides: Sequence[Side], watch: Watch, colour: bool):
        self.console = Console(highlight=False, no_color=None if colour else True)
        self.console.width = self.console.width or WIDE
        self.sides, self.watch = sides, watch
        self.plain = not self.console.is_terminal or self.console.no_color or self.console.is_dumb_terminal
        beside = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.width >= WIDE
        self.live = Live(console=self.console, auto_refresh=False) if beside else None

    def __enter__(self) -> "Screen":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
        for line in self.summary() if kind is None else ():
            self.console.print(line, soft_wrap=not self.console.is_terminal)

    def show(self, side: Side) -> None:
        """The last token of a text is new."""
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            return
        if len(side.tokens) == 1:
            self.console.print(f"{side.name}: ", end="")
        if self.plain:
            self.console.file.write(self.text(side.tokens[-1]).plain)
        else:
            self.console.print(self.text(side.tokens[-1]), end="", soft_wrap=True)
        self.console.file.flush()

    def finish(self) -> None:
        """The text that was written is at its end."""
        if self.live is None:
            self.console.print("\n")

    def table(self) -> Table:
        """Both texts side by side."""
        table = Table(*(side.name for side in self.sides), box=None, expand=True, padding=(0, 2, 0, 0))
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(Text.assemble(*map(self.text, side.tokens)) for side in self.sides))
        return table

    def text(self, token: TokenTrace) -> Text:
        """A token in its colour, without what would control the terminal."""
        said = _CONTROLS.sub("\ufffd", token.text)
        if self.plain:
            lead = said[: len(said) - len(said.lstrip())]
            return Text(f"{lead}[{said.lstrip()}]" if token.intervened else said)
        colours = self.watch.colours
        level = 0 if colours is None or math.isnan(token.value) else colours.level(token.value)
        return Text(said, f"{STYLES[level]} {REPLACED if token.intervened else ''}".strip())

    def summary(self) -> list[str]:
        """How each text ended, and what values mean."""
        colours, lines = self.watch.colours, []
        for side in self.sides:
            replaced = sum(token.intervened for token in side.tokens)
            said = [] if colours is None or not side.tokens else [f"worst value {colours.worst(side.tokens):.4f}"]
            said += [f"{replaced} of {len(side.tokens)} tokens replaced"] if side.name == "steered" else []
            said += ["ended because it would not end well"] if side.ended else []
            lines.append(f"{side.name:9}{', '.join(said)}")
        if colours is not None and self.watch.scorer is not None:
            beyond = "below" if colours.polarity == "undesirable" else "above"
            mark = "in brackets" if self.plain else "underlined"
            lines.append(
                f"A high value is {colours.polarity}; a token is acceptable {beyond} {colours.threshold:.4f}. "
                f"Tokens {mark} took the place of ones that were not."
            )
        return lines
