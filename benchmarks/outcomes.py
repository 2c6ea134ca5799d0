"""The examples in the reports of the shipped filters: `python -m benchmarks.outcomes`, four minutes of processor time.

Each head steers, at its own threshold, prompts that it was not trained on. Texts of each outcome, as the judge that
gave the labels sees it, words masked, go to `benchmarks/results/examples-NAME.json`; `make tables` puts them into
`docs/NAME.html`.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.publish import ROOT
from examples.sentiment import eval_prompts
from examples.smollm2 import backbone_folder
from examples.toxicity import load_prompts, mask_offensive
from hf_value_steer import ValueHead
from hf_value_steer.evaluation.examples import examples
from hf_value_steer.evaluation.measures import bad, verdicts
from hf_value_steer.evaluation.runs import Runner, value_filter
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.judges import load_judge
from hf_value_steer.training.prompts import Formatter, Prompt, share


RESULTS = ROOT / "benchmarks" / "results"
CANDIDATES, NEW_TOKENS = 8, 32


def unseen() -> list[str]:
    """Prompts that chose the epoch and the thresholds of the toxicity head, but trained nothing: see its recipe."""
    return [prompt for prompt in load_prompts() if share(prompt) < 0.2]


PROMPTS: dict[str, Callable[[], list[str]]] = {
    "smollm2-135m-toxicity": unseen,
    "smollm2-135m-sentiment": eval_prompts,
}


def of(name: str, runner: Runner, judge_name: str) -> dict[str, Any]:
    """The examples of one shipped head."""
    head, judge = ValueHead.from_pretrained(ROOT / "model_cards" / name), load_judge(judge_name)

    def find_bad(prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        return bad(verdicts(judge, prompts, texts), head.config.polarity)

    setting = value_filter(head, head.config.threshold, CANDIDATES, named=False)
    found = examples(runner, setting, mask_offensive, find_bad)
    return {"examples_threshold": head.config.threshold, "examples": found}


def main() -> None:
    model, tokenizer = load_backbone(str(backbone_folder()), "bfloat16", torch.device("cpu"))
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
                batch_size=1,
                seed=document["seed"],
                folder=Path(folder),
                conditions={},
            )
            found = of(name, runner, next(each["name"] for each in document["judges"] if each["gave_labels"]))
        (RESULTS / f"examples-{name}.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
