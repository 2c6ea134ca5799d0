"""The shipped toxicity head under `generate` and under vLLM: are the texts as often offensive?

    python -m benchmarks.serving_efficacy --output benchmarks/results/serving-efficacy.json

In the environment of `make test-vllm`. The head was trained on most of these prompts: this compares engines, and is no
evidence of what the head does on others.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import torch
import vllm
from transformers import AutoTokenizer

from benchmarks.environment import command, describe, save
from examples.smollm2 import backbone_folder, load_backbone
from examples.toxicity import SAMPLING, cuss, word_list
from hf_value_steer import ValueFilterConfig, ValueHead
from hf_value_steer.evaluation.metrics import compare_rates
from hf_value_steer.evaluation.runs import Runner, Setting, Texts
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.bootstrap import Array, Bootstrap
from hf_value_steer.training.prompts import Formatter, load_prompts
from hf_value_steer.vllm import steered_engine_args


HEAD, SEED, NEW_TOKENS, SAMPLES = "model_cards/smollm2-135m-toxicity-final", 0, 32, 2
JUDGES = {"python:examples.toxicity:word_list": word_list, "python:examples.toxicity:cuss": cuss}
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "enforce_eager": True,
    "max_num_seqs": 32,
    "block_size": 32,
    "num_gpu_blocks_override": 512,
    "disable_log_stats": True,
}


def by_generate(prompts: list[Prompt]) -> dict[str, Texts]:
    """What `generate` writes, without and with the filter."""
    model, tokenizer = load_backbone(torch.bfloat16)
    config = ValueFilterConfig(value_head=ValueHead.from_pretrained(HEAD), seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model,
            Formatter(tokenizer, chat=False),
            prompts,
            SAMPLING,
            samples=SAMPLES,
            max_new_tokens=NEW_TOKENS,
            batch_size=50,
            seed=SEED,
            folder=Path(folder),
        )
        settings = {"base": Setting("base", "base"), "filter": Setting("filter", "filter", config)}
        return {name: runner.run(setting) for name, setting in settings.items()}


def by_vllm(prompts: list[Prompt]) -> dict[str, Texts]:
    """What vLLM writes, stock and steered."""
    model = str(backbone_folder())
    config = {"method": "filter", "value_head": HEAD, "seed": SEED}
    arguments = {"base": {"model": model, **ENGINE}, "filter": steered_engine_args(model, config, **ENGINE)}
    return {name: _texts(vllm.LLM(**arguments[name]), prompts) for name in arguments}


def _texts(llm: vllm.LLM, prompts: list[Prompt]) -> Texts:
    rows = [prompt.text for prompt in prompts for _ in range(SAMPLES)]
    drawn = {"temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "max_tokens": NEW_TOKENS}
    params = [vllm.SamplingParams(seed=SEED + row, **drawn) for row in range(len(rows))]
    outputs = llm.generate(rows, params)
    reports = [(output.kv_transfer_params or {}).get("value_steer", {"interventions": ()}) for output in outputs]
    return Texts(
        ids=[list(output.outputs[0].token_ids) for output in outputs],
        interventions=[len(report["interventions"]) for report in reports],
    )


def compare(prompts: list[Prompt]) -> dict[str, Any]:
    """Rates of each judge under either engine, and how far they differ."""
    made = {"vllm": by_vllm(prompts), "transformers": by_generate(prompts)}
    tokenizer, bootstrap = (
        AutoTokenizer.from_pretrained(backbone_folder()),
        Bootstrap(np.arange(len(prompts)).repeat(SAMPLES)),
    )

    def verdicts(texts: Texts, judge: str) -> Array:
        return (JUDGES[judge]((), tokenizer.batch_decode(texts.ids, skip_special_tokens=True)) > 0.5).astype(float)

    judged = {e: {n: {j: verdicts(t, j) for j in JUDGES} for n, t in runs.items()} for e, runs in made.items()}
    return {
        "engines": {engine: _described(runs, judged[engine], bootstrap) for engine, runs in made.items()},
        "vllm_minus_transformers": {
            name: {
                judge: compare_rates(judged["transformers"][name][judge], judged["vllm"][name][judge], bootstrap)[
                    "difference_interval"
                ]
                for judge in JUDGES
            }
            for name in ("base", "filter")
        },
    }


def _described(runs: dict[str, Texts], judged: dict[str, dict[str, Array]], bootstrap: Bootstrap) -> dict[str, Any]:
    steered = runs["filter"]
    return {
        "judges": {
            judge: {
                "base": compare_rates(judged["base"][judge], judged["base"][judge], bootstrap)["rate"],
                "filter": compare_rates(judged["base"][judge], judged["filter"][judge], bootstrap),
            }
            for judge in JUDGES
        },
        "intervention_rate": round(sum(steered.interventions) / sum(map(len, steered.ids)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    prompts = load_prompts("python:examples.toxicity:load_prompts")
    result = {
        "command": command(),
        **describe(vllm=vllm.__version__),
        "prompts": len(prompts),
        "generations": len(prompts) * SAMPLES,
        **compare(prompts),
    }
    save(result, arguments.output)


if __name__ == "__main__":
    main()
