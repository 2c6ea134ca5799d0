"""What the shipped toxicity head costs as it is meant to be used: its threshold, K and rollback, on real prompts.

    python -m benchmarks.operating_point --output benchmarks/results/operating-point.json

Whole calls of `generate` take turns on the same prompts and seeds: plain, watched (lazy steps in which nothing is
rejected), and steered at the head's operating point, with all that this needs: look-ahead, buffers, going back. No
text ends early, so all calls write equally many tokens. A ratio is the time of all batches of a round over that of
plain `generate` in the same round.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.environment import command, describe, save
from examples.smollm2 import load_backbone
from examples.toxicity import SAMPLING, load_prompts
from hf_value_steer import ValueFilterConfig, ValueHead, enable_value_steer


HEAD = "model_cards/smollm2-135m-toxicity"
PROMPTS, NEW_TOKENS = {1: 8, 16: 48}, 32


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: ValueHead, batch: int, rounds: int
) -> dict[str, Any]:
    """Ratios of a batch size, `(rounds,)` each, and how often the head acted."""
    steered = ValueFilterConfig(value_head=head)
    alone = replace(steered.settled(head.config.operating_point), num_candidates=1, rollback=0, threshold=1 - 1e-6)
    runs = {"plain": None, "watched": alone, "steered": steered}
    prompts = load_prompts("all")[: PROMPTS[batch]]
    ratios: dict[str, list[float]] = {"watched": [], "steered": []}
    acted = {"steps": 0, "interventions": 0, "taken_back": 0}
    for number in range(-1, rounds):  # the first one warms up
        seconds = dict.fromkeys(runs, 0.0)
        for first in range(0, len(prompts) if number >= 0 else batch, batch):
            inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True)
            for name, steering in runs.items():
                torch.manual_seed(first)
                start = time.perf_counter()
                out = model.generate(
                    **inputs, **SAMPLING, value_steer=steering, max_new_tokens=NEW_TOKENS, eos_token_id=None,
                    return_dict_in_generate=True,
                )  # fmt: skip
                seconds[name] += time.perf_counter() - start
                if name == "steered" and number == 0:
                    acted["steps"] += out.interventions.numel()
                    acted["interventions"] += int(out.interventions.sum())
                    acted["taken_back"] += int((out.taken_back_steps >= 0).sum())
        if number >= 0:
            for name, each in ratios.items():
                each.append(round(seconds[name] / seconds["plain"], 4))
    medians = {f"{name}_median": round(statistics.median(each), 3) for name, each in ratios.items()}
    return {"batch": batch, "prompts": len(prompts), **ratios, **medians, **acted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    head = ValueHead.from_pretrained(HEAD)
    point = ValueFilterConfig(value_head=head).settled(head.config.operating_point)
    document: dict[str, Any] = {
        "command": command(),
        **describe(),
        "feature_layers": head.config.feature_layers,
        "threshold": head.config.threshold,
        "num_candidates": point.num_candidates,
        "rollback": point.rollback,
        "cases": [],
    }
    for dtype in arguments.dtypes:
        model, tokenizer = load_backbone(getattr(torch, dtype))
        enable_value_steer(model)
        for batch in PROMPTS:
            case = {"dtype": dtype, **measure(model, tokenizer, head, batch, arguments.rounds)}
            document["cases"].append(case)
            print(case, flush=True)
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
