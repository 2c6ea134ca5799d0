"""How the cost of steering grows with K and with the length of the prompt: a JSON file and a plot.

    python -m benchmarks.scaling --output benchmarks/results/scaling-float32.json --plot docs/scaling.png

Times are relative to plain `generate` with its default cache, medians of pairs (see `benchmarks.timing`). The plot
needs matplotlib: `pip install "hf-value-steer[bench]"`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe, save
from benchmarks.timing import Case, Prompt, compare
from examples.smollm2 import load_backbone


COUNTS = (2, 4, 8, 16)
PROMPTS = (128, 512, 2048, 8000)
KERNELS = ("shared_prefix", "masked", "expanded", "repeated cache")


def ratio(model: Any, pairs: int, prompt: Prompt, **options: Any) -> float:
    """Time relative to plain `generate`."""
    case = {"prompt": prompt.input_ids.shape[1], "new_tokens": 20, "evaluation": "eager", **options}
    if case.get("lookahead") != "repeated cache":
        return float(compare(model, Case("", **case), pairs, prompt)["ratio_median"])
    case["lookahead"] = "auto"
    against_plain = compare(model, Case("", **case), pairs, prompt)["ratio_median"]
    return float(against_plain / compare(model, Case("", **case, against="repeated"), pairs, prompt)["ratio_median"])


def measure(model: Any, pairs: int) -> dict[str, Any]:
    """Curves: `{"by_count": {kernel: [...]}, "by_prompt": {what: [...]}}`."""
    by_prompt: dict[str, list[float]] = {"lazy, 5 %": [], "lazy, 5 %, BlockCache": [], "eager K=8": []}
    by_prompt |= {"eager K=8, BlockCache": [], "repeated cache K=8": []}
    by_count: dict[str, list[float]] = {}
    for length in PROMPTS:
        prompt = Prompt(model, 1, length)
        lazy = {"evaluation": "lazy", "rate": 0.05}
        by_prompt["lazy, 5 %"].append(ratio(model, pairs, prompt, **lazy))
        by_prompt["lazy, 5 %, BlockCache"].append(ratio(model, pairs, prompt, **lazy, cache="block"))
        by_prompt["eager K=8"].append(ratio(model, pairs, prompt))
        by_prompt["eager K=8, BlockCache"].append(ratio(model, pairs, prompt, cache="block"))
        by_prompt["repeated cache K=8"].append(ratio(model, pairs, prompt, lookahead="repeated cache"))
        print(length, {name: values[-1] for name, values in by_prompt.items()}, flush=True)
        if length == 2048:
            for kernel in KERNELS:
                by_count[kernel] = [ratio(model, pairs, prompt, count=count, lookahead=kernel) for count in COUNTS]
                print(kernel, by_count[kernel], flush=True)
    return {"by_count": by_count, "by_prompt": by_prompt}


def draw(curves: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axes, xs, series in ((left, COUNTS, curves["by_count"]), (right, PROMPTS, curves["by_prompt"])):
        for name, values in series.items():
            axes.plot(xs, values, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
    left.set(xlabel="candidates K, eager", ylabel="time, plain generate = 1", title="2,048-token prompt")
    right.set(xlabel="prompt tokens", title="by length of the prompt")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    model, _ = load_backbone(getattr(torch, arguments.dtype))
    curves = measure(model, arguments.pairs)
    report = {
        "command": f"python -m benchmarks.scaling --dtype {arguments.dtype} --pairs {arguments.pairs}",
        **describe(),
        "counts": COUNTS,
        "prompts": PROMPTS,
        **curves,
    }
    if arguments.output:
        save(report, arguments.output)
    if arguments.plot:
        draw(curves, arguments.plot)


if __name__ == "__main__":
    main()
