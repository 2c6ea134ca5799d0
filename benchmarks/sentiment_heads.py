"""Which head of the sentiment recipe steers best, if it may touch a half of the safe texts?

    hf-value-steer run examples/recipes/smollm2-sentiment.yaml      # its collections are read
    python -m benchmarks.sentiment_heads --output benchmarks/results/sentiment-heads.json

Each choice is trained without a fifth of the recipe's training prompts, calibrated as the recipe does it, and steers
100 of the held-out prompts with the threshold of `alpha=0.5`. Safe: neither of the two judges that gave no label
objects. Intervals are 95 % bootstraps over prompts.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import command, describe, save
from examples.sentiment import minilm_negative, other_reviews_negative, vader_negative
from examples.smollm2 import load_backbone
from hf_value_steer import ValueFilterConfig, ValueHead
from hf_value_steer.backbone.features import Layer
from hf_value_steer.evaluation.crossfit import held_out_prompts, without_fold
from hf_value_steer.evaluation.metrics import compare_rates, share_among
from hf_value_steer.evaluation.runs import Runner, Setting, Texts
from hf_value_steer.files.marked import read_marked
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.bootstrap import Bootstrap
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.train import train


RECIPE = Path("examples/recipes/smollm2-sentiment.yaml")
JUDGES = {"other_reviews": other_reviews_negative, "vader": vader_negative, "minilm": minilm_negative}
ALPHA, PROMPTS, SAMPLES, FOLDS = 0.5, 100, 2, 5


@dataclass(frozen=True)
class Choice:
    """Where a head reads, what it remembers, and how the filter uses it."""

    layers: tuple[Layer, ...]
    temporal: str = "none"
    filter: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        where = ", ".join(map(str, self.layers))
        options = "".join(f", {name} {value}" for name, value in self.filter.items())
        return f"layer {where}, memory {self.temporal}{options}"

    @property
    def head(self) -> str:
        return "-".join(map(str, (*self.layers, self.temporal)))


CHOICES = [
    Choice(("final",)),
    Choice((11,)),
    Choice((11,), "mean"),
    Choice((11,), "ema"),
    Choice((27,), "ema"),
    Choice((7, 11, 19), "ema"),
    Choice((7, 11, 19), "ema", {"rollback": 0}),
    Choice((7, 11, 19), "ema", {"num_candidates": 16, "rollback": 12}),
]


def made(steps: Steps, choice: Choice, folder: Path) -> ValueHead:
    """The head of a choice, trained and calibrated without the prompts that it will steer."""
    assert steps.train is not None and steps.calibrate is not None
    chosen = replace(steps.train, feature_layers=list(choice.layers), temporal=choice.temporal)
    own = without_fold(chosen, str(folder / choice.head), 0, FOLDS)
    train(own)
    calibrate(replace(steps.calibrate, value_head=own.output))
    return ValueHead.from_pretrained(own.output)


def verdicts(runner: Runner, texts: Texts) -> dict[str, np.ndarray]:
    """Whether each judge objects to each text, `(texts,)` of 0 and 1."""
    written = runner.formatter.tokenizer.batch_decode(texts.ids, skip_special_tokens=True)
    return {name: (judge(written, written) > 0.5).astype(float) for name, judge in JUDGES.items()}


def measured(runner: Runner, base: Texts, steered: Texts, metrics: dict[str, Any]) -> dict[str, Any]:
    """One entry of the result file."""
    before, after = verdicts(runner, base), verdicts(runner, steered)
    bootstrap = Bootstrap(np.repeat(np.arange(len(runner.prompts)), runner.samples))
    safe = 1 - np.maximum(before["other_reviews"], before["vader"])
    changed = np.array([one != other for one, other in zip(base.ids, steered.ids, strict=True)], dtype=float)
    touched, bounds = share_among(changed, safe, bootstrap)
    tokens = sum(map(len, steered.ids))
    return {
        "text_auroc": metrics["text_auroc"],
        "judges": {name: compare_rates(before[name], after[name], bootstrap) for name in JUDGES},
        "touched_safe": touched,
        "touched_safe_interval": bounds,
        "intervention_rate": round(sum(steered.interventions) / tokens, 4),
        "length": round(tokens / sum(map(len, base.ids)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    steps = Steps(read_marked(RECIPE))
    assert steps.train is not None and steps.evaluate is not None
    folder = Path(steps.train.output).parent / "heads"
    prompts = held_out_prompts(Collection(steps.train.collection), without_fold(steps.train, "", 0, FOLDS))[:PROMPTS]
    model, tokenizer = load_backbone(torch.float32)
    sizes = {"samples": SAMPLES, "max_new_tokens": steps.collect.max_new_tokens, "batch_size": 50, "seed": 0}
    sampling = steps.evaluate.sampling()
    formatter, runs = Formatter(tokenizer, chat=False), folder / "runs"
    runner = Runner(model, formatter, prompts, sampling, **sizes, folder=runs)
    base = runner.run(Setting("base", "base"))
    counts = {"alpha": ALPHA, "prompts": PROMPTS, "texts": len(base.ids)}
    report: dict[str, Any] = {"command": command(), **describe(), **counts, "tried": {}}
    for choice in CHOICES:
        head = made(steps, choice, folder)
        assert head.calibration is not None
        threshold = head.calibration.promised_threshold(ALPHA)
        options = {"num_candidates": 8, "rollback": 6, **choice.filter}
        config = ValueFilterConfig(value_head=head, threshold=threshold, **options)
        texts = runner.run(Setting(choice.name, "filter", config, options["num_candidates"], threshold))
        report["tried"][choice.name] = measured(runner, base, texts, head.config.training["metrics"])
        print(choice.name, report["tried"][choice.name], flush=True)
        save(report, arguments.output)


if __name__ == "__main__":
    main()
