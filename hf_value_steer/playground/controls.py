"""The controls of the page: one for each of the settings."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from hf_value_steer.playground.settings import Settings
from hf_value_steer.playground.writing import Writer


_YOU, _PROMISE = "you", "a promise (alpha)"
_CONTINUE, _ANSWER = "continue the text", "answer in a chat"


class Controls:
    """Made inside a `gr.Blocks`.

    Args:
        writer: what it can do decides which controls are shown.
        at_first: where the controls stand at first.

    Attributes:
        kind: whether the prompt is continued or answered. It stands beside the prompt, so the page places it.
        named (`dict`): the control of each field of [`Settings`], but for `layers`.
        layers (`list`): a control for each layer that has a vector.
    """

    def __init__(self, writer: Writer, at_first: Settings):
        self.writer, self.at_first = writer, at_first
        kinds = [_CONTINUE, _ANSWER] if writer.chats else [_CONTINUE]
        self.kind = gr.Radio(
            kinds, value=kinds[at_first.chat and writer.chats], label="The model is to", render=False, elem_id="kind"
        )
        self.named: dict[str, Any] = {"chat": self.kind}
        self.layers: list[Any] = []

    def render(self) -> None:
        """Place all controls but `kind`, one below the other."""
        with gr.Group():
            self._when()
        if self.writer.vectors is not None:
            with gr.Group():
                self._vectors(self.writer.vectors.layers, self.writer.vectors.attribute)
        with gr.Group():
            self._sampling()

    def settings(self, given: dict[Any, Any]) -> Settings:
        """What the controls say."""
        found = {name: given[control] for name, control in self.named.items()}
        found |= {"chat": found["chat"] == _ANSWER, "promised": found.get("promised") == _PROMISE}
        whole = {name: int(found[name] or 0) for name in ("num_candidates", "rollback", "max_new_tokens", "seed")}
        return Settings(**{**found, **whole}, layers=tuple(given[each] for each in self.layers))

    def all(self) -> Iterator[Any]:
        """Every control."""
        yield from self.named.values()
        yield from self.layers

    def _when(self) -> None:
        """Which head acts, and when."""
        at_first, calibration, named = self.at_first, self.writer.head.calibration, self.named
        info, own = "filter replaces tokens, abstain ends the text", self.writer.head.config.threshold
        named["method"] = gr.Radio(
            ["filter", "abstain"], value=at_first.method, label="Method", info=info, elem_id="method"
        )
        if calibration is not None:
            kinds = [_YOU, _PROMISE]
            named["promised"] = gr.Radio(
                kinds, value=kinds[at_first.promised], label="The threshold is set by", elem_id="promised"
            )
        named["threshold"] = gr.Slider(
            0.0001, 0.9999, at_first.threshold, step=0.0001, label="Threshold", visible=not at_first.promised,
            info=f"the head's own is {own:.4g}" if own else None, elem_id="threshold",
        )  # fmt: skip
        named["alpha"] = gr.Slider(
            0.01, 0.99, at_first.alpha, step=0.01, label="alpha", visible=at_first.promised,
            info=calibration and calibration.guarantee, elem_id="alpha",
        )  # fmt: skip
        named["num_candidates"] = gr.Slider(
            1, max(32, at_first.num_candidates), at_first.num_candidates, step=1, label="Candidates (K) of the filter",
            elem_id="num_candidates",
        )  # fmt: skip
        named["rollback"] = gr.Slider(
            0, max(16, at_first.rollback), at_first.rollback, step=1, label="Tokens to take back (rollback)",
            info="where no candidate is acceptable; 0 takes none back", elem_id="rollback",
        )  # fmt: skip
        if "promised" in named:
            shown = [named["threshold"], named["alpha"]]
            named["promised"].change(_shown, named["promised"], shown, show_progress="hidden", queue=False)

    def _vectors(self, layers: tuple[int, ...], attribute: str | None) -> None:
        """How much of the vectors is added."""
        more = f"; above 0 there is more {attribute}" if attribute else ""
        self.named["multiplier"] = gr.Slider(
            -2,
            2,
            0,
            step=0.05,
            label="Multiplier of the vectors",
            info=f"0 is without them{more}",
            elem_id="multiplier",
        )
        with gr.Accordion("Factors of single layers", open=False, elem_id="layers"):
            self.layers = [gr.Slider(0, 2, 1, step=0.1, label=f"Layer {layer}") for layer in layers]

    def _sampling(self) -> None:
        """How tokens are drawn, and how many."""
        at_first, named = self.at_first, self.named
        named["max_new_tokens"] = gr.Slider(
            1, 512, at_first.max_new_tokens, step=1, label="Max new tokens", elem_id="max_new_tokens"
        )
        named["seed"] = gr.Number(
            at_first.seed, precision=0, minimum=0, label="Seed", info="of both texts", elem_id="seed"
        )
        named["temperature"] = gr.Slider(
            0, 2, at_first.temperature, step=0.05, label="Temperature", info="0 takes the most likely token",
            elem_id="temperature",
        )  # fmt: skip
        named["top_p"] = gr.Slider(0.05, 1, at_first.top_p, step=0.05, label="Top p", elem_id="top_p")


def _shown(kind: str) -> tuple[Any, Any]:
    """Of threshold and alpha, the one that counts."""
    return gr.update(visible=kind == _YOU), gr.update(visible=kind == _PROMISE)
