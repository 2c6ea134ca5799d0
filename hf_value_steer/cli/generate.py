"""`generate`: a prompt continued in the terminal, base beside steered, every token coloured by its value."""

import math
import re
from collections.abc import Sequence

from accelerate import PartialState
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from hf_value_steer.arguments.steer import GenerateArguments
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.configuration.parse import parse_configs
from hf_value_steer.evaluation.trace import TokenTrace
from hf_value_steer.evaluation.watching import Side, Watch, write
from hf_value_steer.files.kept import given_or_loaded
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.in_the_loop import names_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter


# Of the six levels of [`Colours`], as on pages.
STYLES = ("", "black on #fdf5dc", "black on #fbdf98", "black on #f5a742", "black on #de6f1b", "white on #7a2a08")
REPLACED = "bold underline"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # and directions
WIDE = 80  # columns of a terminal that two texts fit in side by side


def generate(arguments: GenerateArguments) -> None:
    """Write both texts, token by token, and then what the values were."""
    logging.disable_progress_bar()
    methods = parse_configs(arguments.configuration())
    asked = [methods[name] for name in sorted(methods, key=lambda name: name != "filter")]  # who replaces comes first
    with_heads = (each for each in asked if isinstance(each, SteeringConfig) and not names_judge(each.value_head))
    valued = next((each for each in with_heads if each.value_head is not None), None)
    head = None if valued is None else given_or_loaded(ValueHead.from_pretrained, valued.value_head)
    model, tokenizer = load_backbone(_backbone(arguments, head), arguments.dtype, PartialState().device)
    as_trained = head is not None and head.config.trained_on_chats
    formatter = Formatter(tokenizer, as_trained if arguments.chat is None else arguments.chat)
    inputs = formatter([Prompt(arguments.prompt)], model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("The prompt has no tokens: this tokenizer begins no text by itself.")
    options = {**arguments.sampling(), "max_new_tokens": arguments.max_new_tokens}
    base, steered = sides = [Side("base"), Side("steered", unsettled=_unsettled(methods.get("filter"), head))]
    watch = Watch(valued, tokenizer)
    with Screen(sides, watch, arguments.color, replaces="filter" in methods) as screen:
        watch.show = screen.show
        for side, steering in ((base, []), (steered, asked)):
            write(side, steering, watch, model, inputs, arguments.seed, **options)
            screen.finish(side)


def _backbone(arguments: GenerateArguments, head: ValueHead | None) -> str:
    named = arguments.model or (head and head.config.backbone)
    if not named:
        raise ValueError("Pass --model: the head names no backbone.")
    return str(named)


def _unsettled(config: MethodConfig | None, head: ValueHead | None) -> int:
    """How many tokens may be others later: those that a filter may take back, and the dead end behind them."""
    if not isinstance(config, ValueFilterConfig):
        return 0
    back = config.settled(head and head.config.operating_point).rollback
    return back and back + 1


class Screen:
    """Shows two texts while they are written: side by side, or, where there is no room or no terminal, one by one.

    One by one, a token is written once it can no longer be taken back.

    Args:
        sides: the texts.
        watch: knows the colours.
        colour (`bool`): whether the user wants colours. Without them, replaced tokens stand in brackets.
        replaces (`bool`): whether a method replaces tokens.
    """

    def __init__(self, sides: Sequence[Side], watch: Watch, colour: bool, replaces: bool):
        self.replaces = replaces
        self.console = Console(highlight=False, no_color=None if colour else True)
        self.console.width = self.console.width or WIDE
        self.sides, self.watch = sides, watch
        self.plain = not self.console.is_terminal or self.console.no_color or self.console.is_dumb_terminal
        beside = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.width >= WIDE
        self.live = Live(console=self.console, auto_refresh=False) if beside else None
        self.written = {side.name: 0 for side in sides}  # tokens, where texts are shown one by one

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
        """The last tokens of a text are new."""
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
        else:
            self._write(side, len(side.tokens) - side.unsettled)

    def finish(self, side: Side) -> None:
        """The text that was written is at its end."""
        if self.live is None:
            self._write(side, len(side.tokens))
            self.console.print("\n")

    def _write(self, side: Side, count: int) -> None:
        """Write the text up to so many tokens."""
        for token in side.tokens[self.written[side.name] : max(count, 0)]:
            if self.written[side.name] == 0:
                self.console.print(f"{side.name}: ", end="")
            if self.plain:
                self.console.file.write(self.text(token).plain)
            else:
                self.console.print(self.text(token), end="", soft_wrap=True)
            self.written[side.name] += 1
        self.console.file.flush()

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
        return Text(said, f"{STYLES[self.level(token)]} {REPLACED if token.intervened else ''}".strip())

    def level(self, token: TokenTrace) -> int:
        """Of [`Colours`], 0 where there is no value."""
        colours = self.watch.colours
        return 0 if colours is None or math.isnan(token.value) else colours.level(token.value)

    def summary(self) -> list[str]:
        """How each text ended, and what values mean."""
        colours, lines = self.watch.colours, []
        for side in self.sides:
            said = [] if colours is None or not side.tokens else [f"worst value {colours.worst(side.tokens):.4f}"]
            if side.name == "steered" and self.replaces:
                said.append(f"{side.replaced} of {len(side.tokens)} tokens replaced")
                kept = 0 if colours is None else colours.kept(side.tokens)
                said += [f"{kept} kept though not acceptable"] if kept else []
                said += [f"{side.taken_back} taken back"] if side.taken_back else []
            said += ["ended because it would not end well"] if side.ended else []
            lines += [f"{side.name:9}{', '.join(said)}"] if said else []
        if colours is not None and self.watch.scorer is not None:
            beyond = "below" if colours.polarity == "undesirable" else "above"
            mark = "in brackets" if self.plain else "underlined"
            lines.append(
                f"A high value is {colours.polarity}; a token is acceptable {beyond} {colours.threshold:.4f}. "
                f"Tokens {mark} took the place of ones that were not."
            )
        return lines
