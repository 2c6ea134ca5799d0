"""The page itself: where things stand, and what happens when a button is pressed."""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
import pandas as pd

from hf_value_steer.playground import markup
from hf_value_steer.playground.controls import Controls
from hf_value_steer.playground.settings import Settings
from hf_value_steer.playground.writing import Turn, Writer


_FONTS = ("system-ui", "sans-serif")  # of the reader's machine: nothing is fetched
_COLOURS = {"base": "#8a8f98", "steered": "#2f6fde", "threshold": "#d97706"}


class Page:
    """The playground of one model.

    Args:
        writer: model, head and vectors.
        settings: where the controls stand at first.
        name (`str`): what the page calls the model.
    """

    def __init__(self, writer: Writer, settings: Settings, name: str):
        self.writer, self.settings, self.name = writer, settings, name
        with gr.Blocks(analytics_enabled=False, title="hf-value-steer") as self.blocks:
            self._build()

    @contextmanager
    def served(self, host: str, port: int | None) -> Iterator[str]:
        """Serve the page for as long as the block lasts; gives its address.

        Args:
            host (`str`): address to listen on.
            port (`int`, *optional*): the first free one from 7860 on if left out.

        Raises:
            OSError: if the port is taken.
        """
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=_theme(),
            head=f"<style>{markup.style()}</style>",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
        try:
            yield address
        finally:
            self.writer.close()
            self.blocks.close(verbose=False)

    def _build(self) -> None:
        self.controls = controls = Controls(self.writer, self.settings)
        self.past = gr.State([])
        gr.HTML(markup.top(self.name, self.writer.head), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Group():
                    controls.kind.render()
                    hint = "A text to continue, or a message to answer. Shift+Enter writes."
                    self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=8, placeholder=hint, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write", min_width=80)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", min_width=80)
                self.texts = gr.HTML(markup.texts([]), elem_id="texts", apply_default_css=False)
                self.plot = gr.LinePlot(
                    x="token", y="value", color="text", color_map=_COLOURS, tooltip=["piece", "token", "value"],
                    title="Value of each token", color_title="", x_title="token", y_title="value",
                    y_lim=[0, 1], height=260, show_label=False, visible=False, elem_id="plot", buttons=[],
                )  # fmt: skip
            with gr.Column(scale=2, min_width=300):
                controls.render()
        self._connect(go, stop, clear)

    def _connect(self, go: Any, stop: Any, clear: Any) -> None:
        outputs = [self.texts, self.plot, self.past]
        told = {self.prompt, self.past, *self.controls.all()}
        # One at a time: who comes later sees the place in the queue, and gets what the seed says.
        how = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "full",
            "show_progress_on": self.texts,
            "trigger_mode": "once",
        }
        writing = [
            event(self._write, told, outputs, **how, api_visibility="private")
            for event in (go.click, self.prompt.submit)
        ]
        stop.click(None, cancels=writing, api_visibility="private")
        clear.click(lambda: _shown([]), None, outputs, cancels=writing, queue=False, api_visibility="private")

    def _write(self, given: dict[Any, Any]) -> Iterator[tuple[Any, Any, list[Turn]]]:
        """Both texts, as often as there is more of them."""
        settings = self.controls.settings(given)
        past = [turn for turn in given[self.past] if settings.chat]
        try:
            for turn in self.writer.write(given[self.prompt], settings, past):
                yield _shown([*past, turn])
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            yield _shown(given[self.past])
            raise gr.Error(html.escape(str(error)), duration=20, print_exception=False) from error


def _theme() -> Any:
    """Orange is for values; small print is dark enough to be read."""
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace"))
    grey = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_400"}
    return theme.set(**grey, body_text_color_subdued="*neutral_500", slider_color="*primary_600")


def _shown(turns: list[Turn]) -> tuple[str, Any, list[Turn]]:
    """What the page is to show: the texts, the plot of the last ones, and what a chat goes on from."""
    return markup.texts(turns), _plotted(turns[-1]) if turns else gr.update(visible=False), turns


def _plotted(turn: Turn) -> Any:
    """The values of both texts over time, and the threshold."""
    if turn.colours is None:
        return gr.update(visible=False)
    rows: list[Sequence[Any]] = []
    for side in (turn.base, turn.steered):
        rows += [(count, token.value, side.name, token.text) for count, token in enumerate(side.tokens, 1)]
        rows += [] if side.tokens else [(1, None, side.name, "")]  # the plot takes no names that come later
    last = max(row[0] for row in rows)
    rows += [(count, turn.colours.threshold, "threshold", "") for count in (1, last)]
    return gr.update(value=pd.DataFrame(rows, columns=["token", "value", "text", "piece"]), visible=True)
