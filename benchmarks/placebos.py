"""Does a placebo of the sentiment head move a judge? Several shuffles of its weights, and values that are noise.

    python -m benchmarks.placebos --output benchmarks/results/placebos-sentiment.json

On the prompts of `benchmarks/results/smollm2-135m-sentiment.json`, each as often as the head intervenes there. A
shuffled head rejects the same tokens again and again, so that what is drawn has another distribution; noise, drawn
anew for every token, leaves it as it is. The result file is of the head that was here before, on the final state.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import command, describe, save
from examples.sentiment import eval_prompts
from examples.smollm2 import load_backbone
from examples.toxicity import SAMPLING
from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.evaluation.metrics import compare_rates
from hf_value_steer.evaluation.runs import Runner, Setting, Texts, placebo, shuffled
from hf_value_steer.heads.value_head import ValueHeadOutput
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.bootstrap import Bootstrap
from hf_value_steer.training.prompts import Formatter


HEAD, CANDIDATES, RATE, SAMPLES = "model_cards/smollm2-135m-sentiment", 8, 0.24, 2
JUDGES = ["other_reviews_negative", "vader_negative", "minilm_negative"]


class Noise(ValueHead):
    """Values that have nothing to do with the token."""

    def __init__(self, config: ValueHeadConfig):
        super().__init__(config)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> ValueHeadOutput:
        del labels
        values = torch.rand(hidden_states.shape[:-1], generator=self.generator)
        return ValueHeadOutput(logits=values.logit(), values=values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2, 3, 4], help="of the shuffles; 1 is `evaluate`'s"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(torch.bfloat16)
    head, prompts = ValueHead.from_pretrained(HEAD), [Prompt(text) for text in eval_prompts()]
    runner = Runner(
        model, Formatter(tokenizer, False), prompts, SAMPLING, samples=SAMPLES, max_new_tokens=32, batch_size=25,
        seed=0, folder=Path("runs/placebos-sentiment"), conditions={"value_head": head.fingerprint()},
    )  # fmt: skip
    owners = [prompt for prompt in prompts for _ in range(SAMPLES)]
    judges = {name: load_judge(f"python:examples.sentiment:{name}") for name in JUDGES}
    bootstrap = Bootstrap(np.arange(len(prompts)).repeat(SAMPLES))

    def verdicts(texts: Texts) -> dict[str, Any]:
        decoded = tokenizer.batch_decode(texts.ids, skip_special_tokens=True)
        return {name: (judge(owners, decoded) > 0.5).astype(float) for name, judge in judges.items()}

    base = verdicts(runner.run(Setting("base", "base")))
    runs = []
    heads: dict[str, ValueHead] = {f"placebo {seed}": shuffled(head, seed) for seed in arguments.seeds}
    for name, knows_nothing in {**heads, "noise": Noise(ValueHeadConfig(hidden_size=head.config.hidden_size))}.items():
        texts = runner.run(placebo(runner, knows_nothing, CANDIDATES, RATE, name))
        found = verdicts(texts)
        rates = {judge: compare_rates(base[judge], found[judge], bootstrap) for judge in JUDGES}
        steps = round(sum(texts.interventions) / sum(map(len, texts.ids)), 4)
        runs.append({"name": name, "intervention_rate": steps, "judges": rates})
        print(json.dumps(runs[-1]), flush=True)
    document = {"command": command(), **describe()}
    document |= {"prompts": len(prompts), "generations": len(owners)}
    document |= {"base": {name: round(rate.mean(), 4) for name, rate in base.items()}, "placebos": runs}
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
