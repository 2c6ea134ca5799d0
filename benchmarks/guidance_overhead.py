"""Cost of guidance, as ratios to plain `generate` inside one run, prompts included.

    python -m benchmarks.guidance_overhead --dtype bfloat16 --output benchmarks/results/guidance-overhead-bfloat16.json

An untrained module of the recipe's size guides every token, so that no bridge is ever left out. Plain and guided
generation take turns, token by token. Memory is that after a long prompt.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.environment import command, describe, save
from benchmarks.memory import compare_memory
from benchmarks.timing import Turns, in_turns, summary
from examples.smollm2 import load_backbone
from hf_value_steer import GuidanceConfig, GuidanceModule, GuidanceModuleConfig, value_steer_generate


TOKENS = 128  # of the prompt, and new ones, as in benchmarks.overhead
LAYER, BRIDGES = 21, 2
CASES = ((1, 1, 1.15), (1, 8, 1.25), (0, 1, None), (0, 8, None))  # refresh_interval, batch, limit


def every_token(model: PreTrainedModel, interval: int = 1) -> GuidanceConfig:
    sizes = {"hidden_size": model.config.hidden_size, "layer": LAYER, "num_bridges": BRIDGES}
    module = GuidanceModule(GuidanceModuleConfig(**sizes)).eval()
    return GuidanceConfig(module=module, refresh_interval=interval, neutral_when_safe=False)


def pair(model: PreTrainedModel, config: GuidanceConfig, batch: int) -> float:
    """Time of a guided generation relative to a plain one."""
    input_ids = torch.randint(1000, 20000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))

    def run(turns: Turns, **steer: Any) -> None:
        arguments = {"max_new_tokens": TOKENS, "do_sample": True, "top_k": 0, "eos_token_id": None, **steer}
        mask = torch.ones_like(input_ids)
        model.generate(input_ids, attention_mask=mask, stopping_criteria=[turns], **arguments)

    guided = partial(run, custom_generate=value_steer_generate, value_steer=config)
    plain_seconds, guided_seconds = in_turns(run, guided)
    return guided_seconds / plain_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, _ = load_backbone(getattr(torch, arguments.dtype))
    results = []
    for interval, batch, limit in CASES:
        config = every_token(model, interval)
        ratios = [pair(model, config, batch) for _ in range(arguments.pairs + 1)][1:]  # the first warms up
        results.append({"refresh_interval": interval, "batch": batch, "limit": limit, **summary(ratios)})
        print(results[-1], flush=True)
    document = {"command": command(), **describe(), "dtype": arguments.dtype, "tokens": TOKENS}
    document |= {"layer": LAYER, "bridges": BRIDGES, "cases": results}
    document["memory"] = compare_memory(arguments.dtype, every_token)
    print(document["memory"])
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
