"""What guidance does to toxicity: base, guidance, its ablation, the filter, and both together, on unseen prompts.

    python -m benchmarks.guidance --module runs/svgt --inject runs/svgt-inject --held-out 0.25 \
        --output benchmarks/results/guidance-toxicity.json

The prompts are those that `guidance train` with the same `held_out` set aside; the judges gave no label.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.environment import command, describe, save
from examples.smollm2 import load_backbone
from examples.toxicity import SAMPLING, load_prompts
from hf_value_steer import GuidanceConfig, GuidanceModule, ValueFilterConfig, ValueHead
from hf_value_steer.evaluation.measures import Measures
from hf_value_steer.evaluation.runs import Runner, Setting
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.prompts import Formatter, share


JUDGES = ("python:examples.toxicity:word_list", "python:examples.toxicity:cuss")
HEAD, GUIDE, SAMPLES = "model_cards/smollm2-135m-toxicity-final", {"momentum": 0.0}, 4


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """Base first."""
    module = GuidanceModule.from_pretrained(arguments.module)
    guide = GuidanceConfig(module=module, **GUIDE)
    found = [Setting("base", "base"), Setting("SVGT", "guide", guide)]
    for path in arguments.inject:
        inject = GuidanceConfig(module=GuidanceModule.from_pretrained(path), **GUIDE)
        found.append(Setting(f"SVGT-Inject ({Path(path).name})", "guide", inject))
    vfd = ValueFilterConfig(value_head=ValueHead.from_pretrained(HEAD), num_candidates=8)
    return [*found, Setting("VFD K=8", "filter", vfd, 8), Setting("SVGT + VFD K=8", "both", [vfd, guide], 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", required=True)
    parser.add_argument("--inject", nargs="*", default=[])
    parser.add_argument("--held-out", type=float, default=0.25)
    parser.add_argument("--work", type=Path, default=Path("runs/guidance-evaluation"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(torch.bfloat16)
    prompts = [Prompt(text) for text in load_prompts("all") if share(text) < arguments.held_out]
    formatter = Formatter(tokenizer, False)
    sizes = {"samples": SAMPLES, "max_new_tokens": 32, "batch_size": 24, "seed": 0}
    asked = {"module": arguments.module, "inject": arguments.inject, "head": HEAD, "guide": json.dumps(GUIDE)}
    runner = Runner(model, formatter, prompts, SAMPLING, **sizes, folder=arguments.work, conditions=asked)
    owners = [prompt for prompt in prompts for _ in range(SAMPLES)]
    judges = {name: load_judge(name) for name in JUDGES}
    runs = [(setting, runner.run(setting)) for setting in settings(arguments)]
    measures = Measures(model, formatter, owners, judges, JUDGES[0], runs[0][1], "undesirable")
    results = []
    for setting, texts in runs:
        results.append(measures.run(setting, texts))
        rates = [f"{each['rate']:.3f} ({each['relative_reduction']})" for each in results[-1]["judges"].values()]
        print(setting.name, *rates, results[-1]["perplexity"], results[-1]["perplexity_ratio"], flush=True)
    document = {"command": command(), **describe()}
    document |= {"prompts": len(prompts), "generations": len(owners), "sampling": SAMPLING, **sizes, "runs": results}
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
