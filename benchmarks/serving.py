"""Throughput of steered vLLM against stock vLLM in the same run, in bfloat16: on SmolLM2-135M, or on random weights.

    python -m benchmarks.serving --output benchmarks/results/serving-cpu.json
    python -m benchmarks.serving --shape Llama-3.1-8B --output benchmarks/results/serving-gpu.json

The first in the environment of `make test-vllm`; the second on a CUDA device, with CUDA graphs, needs about 70 GiB.
The engines live side by side in one process and take turns, step by step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm
from transformers import AutoConfig

from benchmarks.environment import command, describe, save
from benchmarks.shapes import MODELS
from examples.smollm2 import backbone_folder
from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.vllm import steered_engine_args


NEW_TOKENS, CANDIDATES, NEVER = 96, 8, 1 - 1e-6
TOPICS = ("the sea", "a small village", "prime numbers", "bread", "the moon", "old maps", "a violin", "winter")
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": not torch.cuda.is_available(),
    "gpu_memory_utilization": 0.24,
    # By itself a CPU engine takes off what the others in the process hold.
    "kv_cache_memory_bytes": None if torch.cuda.is_available() else 1 << 30,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 512,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def random_head(folder: Path, width: int) -> str:
    """An untrained head of the usual size, whose values spread over (0, 1)."""
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(hidden_size=width))
    with torch.no_grad():
        head.net[-1].weight.mul_(8.0)
    head.save_pretrained(folder)
    return str(folder)


@dataclass
class Run:
    """One way to serve.

    Args:
        llm: its engine; several runs may share one.
        threshold (`float`, *optional*): of the filter.
    """

    llm: vllm.LLM
    threshold: float | None = None
    seconds: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def start(self, prompts: Sequence[Any]) -> None:
        extra = None if self.threshold is None else {"filter.threshold": self.threshold}
        options = {"temperature": 0.8, "top_p": 0.95, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        self.seconds, self.reports = 0.0, []
        for index, prompt in enumerate(prompts):
            params = vllm.SamplingParams(seed=index, extra_args=extra, **options)
            self.llm.llm_engine.add_request(str(index), prompt, params)

    def step(self) -> bool:
        """One step of the engine; whether there is another one."""
        start = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        self.seconds += time.perf_counter() - start
        self.reports += [(each.kv_transfer_params or {}).get("value_steer", {}) for each in outputs if each.finished]
        return bool(self.llm.llm_engine.has_unfinished_requests())


def in_turns(runs: Sequence[Run], prompts: Sequence[Any]) -> None:
    """Serve the same requests by every run, step by step, so that what disturbs one disturbs them all.

    Each round begins with another run, so that none has an advantage by what ran before it.
    """
    for run in runs:
        run.start(prompts)
    left = list(runs)
    while left:
        left = [run for run in [*left[1:], left[0]] if run.step()]


def threshold_for(llm: vllm.LLM, share: float, prompts: Sequence[Any]) -> float:
    """The threshold that so many of the natural samples do not pass."""
    run = Run(llm, NEVER)
    in_turns([run], prompts)
    values = torch.tensor([value for report in run.reports for value in report["values"]])
    return float(values.quantile(1 - share).clamp(1e-6, 1 - 1e-6))


def random_model(shape: str, folder: Path) -> tuple[str, list[Any], dict[str, Any]]:
    """A folder without weights, prompts, and how vLLM makes up for what is missing."""
    MODELS[shape].architectures = [f"{type(MODELS[shape]).__name__.removesuffix('Config')}ForCausalLM"]
    MODELS[shape].save_pretrained(folder)
    ids = torch.randint(3, MODELS[shape].vocab_size, (len(TOPICS), 16), generator=torch.Generator().manual_seed(0))
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    return str(folder), prompts, {"load_format": "dummy", "skip_tokenizer_init": True}


def measure(shape: str | None, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        model, prompts, made_up = str(backbone_folder()), [f"Tell me about {topic}." for topic in TOPICS], {}
        if shape is not None:
            model, prompts, made_up = random_model(shape, Path(scratch) / "model")
        width = AutoConfig.from_pretrained(model).hidden_size
        config = {"method": "filter", "value_head": random_head(Path(scratch) / "head", width), "threshold": NEVER}
        options = ENGINE | made_up

        def steered(**changes: Any) -> vllm.LLM:
            return vllm.LLM(**steered_engine_args(model, {**config, **changes}, **options))

        rejecting = steered()
        runs = {
            "stock": Run(vllm.LLM(model=model, **options)),
            "lazy, no interventions": Run(steered(), NEVER),
            "lazy, 5 % of the steps rejected": Run(rejecting, threshold_for(rejecting, 0.05, prompts)),
            f"always K={CANDIDATES}": Run(steered(evaluation="eager"), NEVER),
        }
    return [row for chosen in (prompts[:1], prompts) for row in _compare(runs, chosen, rounds)]


def _compare(runs: dict[str, Run], prompts: Sequence[Any], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each run; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        in_turns(list(runs.values()), prompts)
        for name, run in runs.items():
            seconds[name] += [run.seconds] if turn else []
    tokens = len(prompts) * NEW_TOKENS
    for name, run in runs.items():
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds["stock"], strict=True)]
        row = {
            "requests": len(prompts),
            "run": name,
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "relative_to_stock": statistics.median(ratios),
            "relative_range": [min(ratios), max(ratios)],
            "interventions": sum(len(report.get("interventions", ())) for report in run.reports),
            "candidates": sum(report.get("candidates_evaluated", 0) for report in run.reports),
            "tokens": tokens,
        }
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(MODELS), help="random weights of this shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    facts = {**describe(vllm=vllm.__version__), "command": command()}
    rows = measure(arguments.shape, arguments.rounds)
    model = "SmolLM2-135M-Instruct" if arguments.shape is None else f"{arguments.shape}, random weights"
    result = {**facts, "model": f"{model}, bfloat16", "rows": rows}
    save(result, arguments.output)


if __name__ == "__main__":
    main()
