"""The examples in the reports of the shipped filters: `python -m benchmarks.outcomes`, ten minutes of processor time.

Each head steers, at its own threshold, prompts that it was not trained on. Texts of each outcome, as the judge that
gave the labels sees it, words masked, go to `benchmarks/results/examples-NAME.json`; `make tables` puts them into
`docs/NAME.html`.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.publish import ROOT
from examples.sentiment import eval_prompts
from examples.smollm2 import backbone_folder
from examples.toxicity import load_prompts, mask_offensive
from hf_value_steer import ValueHead
from hf_value_steer.evaluation.examples import FilterRun
from hf_value_steer.evaluation.measures import Measures
from hf_value_steer.evaluation.runs import Runner, Setting, value_filter
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, share


RESULTS = ROOT / "benchmarks" / "results"
CANDIDATES, NEW_TOKENS, BATCH = 8, 32, 16


def unseen(shares: float) -> list[str]:
    """Prompts that trained nothing of a toxicity head: those that chose its epoch, or thresholds, see its recipe."""
    return [prompt for prompt in load_prompts() if share(prompt) < shares]


PROMPTS: dict[str, Callable[[], list[str]]] = {
    "smollm2-135m-toxicity": partial(unseen, 0.1),
    "smollm2-135m-toxicity-final": partial(unseen, 0.2),
    "smollm2-135m-sentiment": eval_prompts,
}


def of(runner: Runner, head: ValueHead, judge_name: str) -> dict[str, Any]:
    """The examples of one head, and how many of its texts had which outcome."""
    assert head.config.threshold is not None
    judges = {judge_name: load_judge(judge_name)}
    base, setting = Setting("base", "base"), value_filter(head, head.config.threshold, CANDIDATES, named=False)
    texts, steered = runner.run(base), runner.run(setting)
    polarity = head.config.polarity
    measures = Measures(runner.model, runner.formatter, runner.prompts, judges, judge_name, texts, polarity)
    outcomes = measures.outcomes(measures.rows(steered))
    found = FilterRun(runner, setting, texts, steered, outcomes).examples(mask_offensive)
    about = {"mask": "python:examples.toxicity:mask_offensive", "outcomes": Counter(outcomes)}
    return {"examples": found, "examples_threshold": setting.threshold, **about}


def main() -> None:
    model, tokenizer = load_backbone(str(backbone_folder()), "float32", torch.device("cpu"))
    for name, prompts in PROMPTS.items():
        document = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(
                model,
                Formatter(tokenizer, chat=False),
                [Prompt(text) for text in prompts()],
                document["sampling"],
                samples=1,
                max_new_tokens=NEW_TOKENS,
                batch_size=BATCH,
                seed=document["seed"],
                folder=Path(folder),
            )
            head = ValueHead.from_pretrained(ROOT / "model_cards" / name)
            found = of(runner, head, next(each["name"] for each in document["judges"] if each["gave_labels"]))
        (RESULTS / f"examples-{name}.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
