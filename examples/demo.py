"""Base and steered generation side by side, in the terminal and as a page: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from examples.smollm2 import BACKBONE_ID, load_backbone
from examples.toxicity import SAMPLING, cuss_score, lexicon_score, load_prompts, mask_offensive, profanity_score
from hf_value_steer import ValueFilterConfig, ValueHead, ValueSteerDecoderOnlyOutput, enable_value_steer
from hf_value_steer.evaluation import PromptTrace, TokenTrace, render_page, trace_tokens


JUDGES = {"word list": lexicon_score, "cuss-inspect": cuss_score, "label judge": profanity_score}
MARKS = {"\ue000": "[", "\ue001": "]"}  # around replaced tokens; private characters until the text is wrapped
COLOURS = {"\ue000": "\033[30;46m", "\ue001": "\033[0m"}


@dataclass
class Results:
    """What was generated; `base` is watched by the head (`num_candidates=1`), `steered` is filtered."""

    prompts: list[str]
    prompt_length: int  # tokens, padding included
    base: ValueSteerDecoderOnlyOutput
    steered: ValueSteerDecoderOnlyOutput


class Bar(BaseStreamer):
    """Shows how far a generation is."""

    def __init__(self, name: str, new_tokens: int):
        self.bar = tqdm(total=new_tokens, desc=name, unit="token", leave=False)

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(value.dim() == 1)  # the prompt comes first, and has two dimensions

    def end(self) -> None:
        self.bar.close()


def pick_prompts(count: int) -> list[str]:
    """The prompts of the evaluation split that the label judge finds most toxic: the hardest to continue."""
    prompts = load_prompts("eval")
    return [prompts[index] for index in np.argsort(-profanity_score(prompts), kind="stable")[:count]]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: ValueFilterConfig,
    seed: int,
    new_tokens: int,
) -> Results:
    """Generate all prompts as one batch, watched and steered, from the same seed."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    enable_value_steer(model)
    outputs = []
    alone = replace(config, num_candidates=1, rollback=0, selection="first")  # which replaces nothing
    for name, steering in (("base", alone), ("steered", config)):
        torch.manual_seed(seed)
        options = {"max_new_tokens": new_tokens, "return_dict_in_generate": True, "streamer": Bar(name, new_tokens)}
        outputs.append(model.generate(**inputs, **SAMPLING, **options, value_steer=steering))
    return Results(prompts, inputs["input_ids"].shape[1], *outputs)


def traces(results: Results, tokenizer: PreTrainedTokenizerBase) -> list[PromptTrace]:
    """The tokens of every prompt, for the table and the page."""
    rows = []
    for row, prompt in enumerate(results.prompts):
        base, steered = (
            trace_tokens(output, tokenizer, row, results.prompt_length) for output in (results.base, results.steered)
        )
        rows.append(PromptTrace(prompt, base, steered))
    return rows


def figures(results: Results, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Rates of both by every judge (on the continuations), how often the filter acted, and what it looked at."""
    outputs = {"base": results.base, "steered": results.steered}
    new_tokens = [output.sequences[:, results.prompt_length :] for output in outputs.values()]
    texts = [tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in new_tokens]
    summary = {}
    for name, judge in JUDGES.items():
        base, steered = (int((judge(side) > 0.5).sum()) for side in texts)
        summary[f"toxic texts ({name})"] = f"{base} → {steered} of {len(results.prompts)}"
    steps = {side: int((~output.token_values.isnan()).sum()) for side, output in outputs.items()}
    return summary | {
        "steps intervened": f"{int(results.steered.interventions.sum()) / steps['steered']:.1%}",
        "candidates per token": f"{int(results.steered.candidates_evaluated.sum()) / steps['steered']:.2f}",
    }


def marked(prompt: str, tokens: list[TokenTrace], reveal: bool) -> str:
    """The continuation, masked, on one line, with private characters around replaced tokens."""
    text = prompt + "".join(token.text for token in tokens)
    shown, position = (text if reveal else mask_offensive(text)), len(prompt)
    pieces = []
    for token in tokens:
        piece = shown[position : position + len(token.text)]
        position += len(token.text)
        lead = piece[: len(piece) - len(piece.lstrip())]
        pieces.append(f"{lead}\ue000{piece.lstrip()}\ue001" if token.intervened else piece)
    return " ".join("".join(pieces).split())


def print_table(rows: list[PromptTrace], summary: dict[str, str], reveal: bool) -> None:
    """Prompt, base and steered text of every row, wrapped to the terminal; then the summary."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    marks = str.maketrans(COLOURS if sys.stdout.isatty() else MARKS)

    def show(label: str, text: str) -> None:
        wrapped = textwrap.wrap(text, width, initial_indent=f"{label:18}", subsequent_indent=" " * 18)
        print("\n".join(wrapped).translate(marks))

    show("", "A high value is bad. Beside each text stands its highest.")
    show("", "\ue000Marked\ue001 tokens took the place of rejected ones.")
    for number, row in enumerate(rows, start=1):
        print("─" * width)
        show(f"{number:2} prompt", row.prompt if reveal else mask_offensive(row.prompt))
        for side in ("base", "steered"):
            tokens = getattr(row, side)
            highest = max((token.value for token in tokens), default=float("nan"))
            show(f"   {side:8}{highest:.3f}", marked(row.prompt, tokens, reveal))
    print("─" * width)
    for name, figure in summary.items():
        print(f"{name:32}{figure}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Base and steered generation side by side.")
    parser.add_argument("--head", default="model_cards/smollm2-135m-toxicity", help="folder or Hub id of the head")
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-candidates", type=int, default=8)
    parser.add_argument("--threshold", type=float, help="default: the head's own")
    parser.add_argument("--output", default="demo.html", help="the page")
    parser.add_argument("--reveal", action="store_true", help="do not mask offensive words")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # few CPUs have instructions for bfloat16
    model, tokenizer = load_backbone(dtype, device)
    head = ValueHead.from_pretrained(arguments.head)
    threshold = arguments.threshold or head.config.threshold
    config = ValueFilterConfig(
        value_head=head, threshold=threshold, num_candidates=arguments.num_candidates, output_candidates=True
    ).settled(head.config.operating_point)
    results = generate(model, tokenizer, pick_prompts(arguments.prompts), config, arguments.seed, arguments.new_tokens)
    rows = traces(results, tokenizer)
    summary = figures(results, tokenizer)
    print_table(rows, summary, arguments.reveal)
    run = {
        "backbone": BACKBONE_ID,
        "head": Path(arguments.head).name,
        "attribute": head.config.attribute or "unnamed",
        "threshold": f"{threshold:g}",
        "candidates": str(config.num_candidates),
        "seed": str(arguments.seed),
        "prompts": f"the {len(rows)} that the label judge finds most toxic",
        "new tokens": str(arguments.new_tokens),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
    } | {name: version(name) for name in ("hf-value-steer", "transformers", "torch")}
    page = render_page(
        rows,
        title="Value-filtered decoding",
        run=run,
        figures=summary,
        threshold=threshold,
        polarity=head.config.polarity,
        mask=mask_offensive,
        reveal=arguments.reveal,
    )
    Path(arguments.output).write_text(page, encoding="utf-8")
    print(f"page: {arguments.output}")


if __name__ == "__main__":
    main()
