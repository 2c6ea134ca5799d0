"""Does a placebo of the sentiment head move a judge by luck? Several shuffles of its weights.

    python -m benchmarks.placebos --output benchmarks/results/placebos-sentiment.json

On the prompts of `benchmarks/results/smollm2-135m-sentiment.json`, each as often as the head intervenes there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import command, describe, save
from examples.sentiment import eval_prompts
from examples.smollm2 import load_backbone
from examples.toxicity import SAMPLING
from hf_value_steer import ValueHead
from hf_value_steer.evaluation.metrics import Bootstrap, compare_rates
from hf_value_steer.evaluation.runs import Runner, Setting, Texts, placebo
from hf_value_steer.training.judges import load_judge
from hf_value_steer.training.prompts import Formatter, Prompt


HEAD, CANDIDATES, RATE, SAMPLES = "model_cards/smollm2-135m-sentiment", 8, 0.24, 2
JUDGES = ["other_reviews_negative", "vader_negative", "minilm_negative"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4], help="of the shuffles; 1 is `evaluate`'s"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/placebos-sentiment"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(torch.bfloat16)
    head, prompts = ValueHead.from_pretrained(HEAD), [Prompt(text) for text in eval_prompts()]
    runner = Runner(
        model, Formatter(tokenizer, False), prompts, SAMPLING, samples=SAMPLES, max_new_tokens=32, batch_size=25,
        seed=0, folder=arguments.work, conditions={"value_head": head.fingerprint()},
    )  # fmt: skip
    owners = [prompt for prompt in prompts for _ in range(SAMPLES)]
    judges = {name: load_judge(f"python:examples.sentiment:{name}") for name in JUDGES}
    bootstrap = Bootstrap(np.arange(len(prompts)).repeat(SAMPLES))

    def verdicts(texts: Texts) -> dict[str, Any]:
        decoded = tokenizer.batch_decode(texts.ids, skip_special_tokens=True)
        return {name: (judge(owners, decoded) > 0.5).astype(float) for name, judge in judges.items()}

    base = verdicts(runner.run(Setting("base", "base")))
    runs = []
    for seed in arguments.seeds:
        texts = runner.run(placebo(runner, head, CANDIDATES, RATE, seed))
        found = verdicts(texts)
        rates = {name: compare_rates(base[name], found[name], bootstrap) for name in JUDGES}
        steps = round(sum(texts.interventions) / sum(map(len, texts.ids)), 4)
        runs.append({"seed": seed, "intervention_rate": steps, "judges": rates})
        print(json.dumps(runs[-1]), flush=True)
    document = {"command": command(), **describe()}
    document |= {"prompts": len(prompts), "generations": len(owners)}
    document |= {"base": {name: round(rate.mean(), 4) for name, rate in base.items()}, "placebos": runs}
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
