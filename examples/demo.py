"""Base and steered generation side by side, in the terminal and as a page: `python -m examples.demo`.

`--attribute toxicity` shows the other head; it has learned from other texts that continue the same prompts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from examples.sentiment import eval_prompts, other_reviews_negative, vader_negative
from examples.smollm2 import BACKBONE_ID, load_backbone
from examples.toxicity import SAMPLING, cuss, load_prompts, mask_offensive, profanity_score, word_list
from hf_value_steer import ValueFilterConfig, ValueHead, ValueSteerDecoderOnlyOutput, enable_value_steer
from hf_value_steer.evaluation import PromptTrace, TokenTrace, render_page, trace_tokens


MARKS = {"\ue000": "[", "\ue001": "]"}  # around replaced tokens; private characters until the text is wrapped
COLOURS = {"\ue000": "\033[30;46m", "\ue001": "\033[0m"}


@dataclass(frozen=True)
class Subject:
    """What a head is shown on: prompts, how they were chosen, what judges say of the texts; none gave it labels."""

    head: str
    prompts: Callable[[], list[str]]
    chosen: str
    judged: str
    judges: dict[str, Callable[[Sequence[object], Sequence[str]], np.ndarray]]


def most_toxic() -> list[str]:
    """The prompts of the evaluation split, those first that the label judge finds most toxic: hard to continue."""
    prompts = load_prompts("eval")
    return [prompts[index] for index in np.argsort(-profanity_score(prompts), kind="stable")]


SUBJECTS = {
    "sentiment": Subject(
        head="model_cards/smollm2-135m-sentiment",
        prompts=eval_prompts,
        chosen="the first {} openings of film reviews that are kept for evaluation",
        judged="negative",
        judges={"other reviews": other_reviews_negative, "VADER": vader_negative},
    ),
    "toxicity": Subject(
        head="model_cards/smollm2-135m-toxicity",
        prompts=most_toxic,
        chosen="the {} that the label judge finds most toxic; the head has learned from other texts of them",
        judged="toxic",
        judges={"word list": word_list, "cuss-inspect": cuss},
    ),
}


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


def figures(results: Results, tokenizer: PreTrainedTokenizerBase, subject: Subject) -> dict[str, str]:
    """Rates of both by every judge (on the continuations), how many safe texts changed, how often the filter acted."""
    outputs = {"base": results.base, "steered": results.steered}
    new_tokens = [output.sequences[:, results.prompt_length :] for output in outputs.values()]
    before, after = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in new_tokens)
    summary, safe = {}, np.ones(len(before), dtype=bool)
    for name, judge in subject.judges.items():
        base, steered = (np.asarray(judge(results.prompts, texts)) > 0.5 for texts in (before, after))
        summary[f"{subject.judged} texts ({name})"] = f"{base.sum()} → {steered.sum()} of {len(results.prompts)}"
        safe &= ~base
    changed = np.array([one != other for one, other in zip(before, after, strict=True)])
    steps = {side: int((~output.token_values.isnan()).sum()) for side, output in outputs.items()}
    return summary | {
        "safe texts touched": f"{(changed & safe).sum()} of {safe.sum()}",
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
    parser.add_argument(
        "--attribute", choices=list(SUBJECTS), default="sentiment", help="what the shown head is about"
    )
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo.html", help="the page")
    parser.add_argument("--reveal", action="store_true", help="do not mask offensive words")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # few CPUs have instructions for bfloat16
    model, tokenizer = load_backbone(dtype, device)
    subject = SUBJECTS[arguments.attribute]
    head = ValueHead.from_pretrained(subject.head)
    config = ValueFilterConfig(value_head=head, output_candidates=True).settled(head.config.operating_point)
    prompts = subject.prompts()[: arguments.prompts]
    results = generate(model, tokenizer, prompts, config, arguments.seed, arguments.new_tokens)
    rows = traces(results, tokenizer)
    summary = figures(results, tokenizer, subject)
    print_table(rows, summary, arguments.reveal)
    run = {
        "backbone": BACKBONE_ID,
        "head": Path(subject.head).name,
        "attribute": head.config.attribute or "unnamed",
        "threshold": f"{head.config.threshold:g}",
        "candidates": str(config.num_candidates),
        "seed": str(arguments.seed),
        "prompts": subject.chosen.format(len(rows)),
        "new tokens": str(arguments.new_tokens),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
    } | {name: version(name) for name in ("hf-value-steer", "transformers", "torch")}
    page = render_page(
        rows,
        title="Value-filtered decoding",
        run=run,
        figures=summary,
        threshold=head.config.threshold,
        polarity=head.config.polarity,
        mask=mask_offensive,
        reveal=arguments.reveal,
    )
    Path(arguments.output).write_text(page, encoding="utf-8")
    print(f"page: {arguments.output}")


if __name__ == "__main__":
    main()
