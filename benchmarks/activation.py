"""Norm-calibrated steering of SmolLM2: relative influence, the working window, gating by a value head, baking, speed.

    python -m benchmarks.activation --output benchmarks/results/activation-toxicity.json \
        --page docs/activation-toxicity.html

Reads what `hf-value-steer run examples/recipes/smollm2-toxicity-final.yaml` left: directions come from its labelled
generations, and everything is judged on the prompts of one of its folds, which neither the directions nor the head of
the fold have seen, by judges that gave no label. What was generated is kept, and a second run goes on from there.
"""

import argparse
import copy
import dataclasses
import itertools
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.environment import command, describe, save
from benchmarks.timing import Turns, in_turns
from examples.smollm2 import BACKBONE_ID, load_backbone
from examples.toxicity import SAMPLING, load_prompts
from hf_value_steer import ActivationConfig, SteeringVectors, ValueHead, value_steer_generate
from hf_value_steer.activation.norms import mean_norms, relative_influence
from hf_value_steer.evaluation.metrics import compare_perplexity, compare_rates
from hf_value_steer.evaluation.runs import Runner, Setting
from hf_value_steer.evaluation.sweep import Sweeper, sweep_page
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.prompts import Formatter, share
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.vectors import vectors_from_collection


FOLD, FOLDS, LABELS = 1, 5, "python:examples.toxicity:profanity"
JUDGES = ["python:examples.toxicity:word_list", "python:examples.toxicity:cuss"]
BUDGET, TEXTS, SCALING_TEXTS, SAMPLES = 1.5, 60, 60, 3
RUN, WORK = Path("runs/smollm2-toxicity-final"), Path("runs/activation-toxicity")
MULTIPLIERS, STRONG = (-1, -0.5, -0.25, 0.25, 0.5, 1, 2), 0.5  # that which is compared with its negative
THRESHOLDS = (0.02, 0.05)  # of the gate
Sequences = list[list[int]]


def make_vectors(model: PreTrainedModel, tokenizer: Any, sequences: Sequences) -> SteeringVectors:
    """Directions from generations to prompts outside the fold, norms on `sequences`; kept in `WORK`."""
    folder = WORK / "vectors"
    if not (folder / "steering_vectors.json").exists():
        collection = Collection(RUN / "collection")
        known = [prompt.text for prompt in collection.prompts if not unseen(prompt)][:TEXTS]
        vectors = vectors_from_collection(
            model, tokenizer, collection, LABELS, prompts=set(known), attribute="toxicity", batch_size=32
        )
        scaled = vectors.scale(model, sequences)
        dataclasses.replace(scaled, backbone=BACKBONE_ID).save_pretrained(folder)
    return SteeringVectors.from_pretrained(folder)


def unseen(prompt: Prompt) -> bool:
    """Whether a prompt is of the fold, which its head was not trained on."""
    return (share(prompt.text) - FOLD / FOLDS) % 1.0 < 1 / FOLDS


def unseen_prompts() -> list[str]:
    """Prompts of the fold, for `vectors sweep --prompts python:benchmarks.activation:unseen_prompts`."""
    return [text for text in load_prompts() if unseen(Prompt(text))]


def influence(model: PreTrainedModel, vectors: SteeringVectors, sequences: Sequences) -> dict[str, Any]:
    """Relative influence on some texts; scaled by the norms, and with one strength for all layers."""
    flat = dataclasses.replace(vectors, strengths=torch.full_like(vectors.strengths, vectors.strengths[0].item()))
    ends = flat.only([vectors.layers[0], vectors.layers[-1]])
    rho = vectors.rho[0].item()
    return {
        "layers": list(vectors.layers),
        "norms": [round(norm, 1) for norm in mean_norms(model, sequences).tolist()],
        "norms_with_first_token": [round(norm, 1) for norm in mean_norms(model, sequences, skip=0).tolist()],
        "rho": round(rho, 5),
        "measured_to_rho": [round(found / rho, 4) for found in relative_influence(model, vectors, sequences).tolist()],
        "flat_to_rho_at_both_ends": [
            round(found / rho, 4) for found in relative_influence(model, ends, sequences).tolist()
        ],
    }


def gating(sweeper: Sweeper, head: ValueHead, multiplier: float, threshold: float) -> dict[str, Any]:
    """Steer only while the value is not acceptable."""
    config = ActivationConfig(vectors=sweeper.vectors, multiplier=multiplier, value_head=head, threshold=threshold)
    setting = Setting(f"gated m={multiplier:g} c={threshold:g}", "gated", config)
    run = sweeper.run(multiplier, setting=setting)
    values = [value for row in sweeper.runner.run(setting).values for value in row]
    run |= {"gate_threshold": threshold, "steered_steps": round(sum(v >= threshold for v in values) / len(values), 4)}
    return run


def baking(vectors: SteeringVectors, multiplier: float, sequences: Sequences) -> dict[str, Any]:
    """The baked checkpoint against the hooked model, in float32 and bfloat16, and its speed."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_backbone(dtype)
        with tempfile.TemporaryDirectory() as folder:
            report = vectors.bake(model, multiplier, Path(folder) / "baked", sequences=sequences)
            baked = AutoModelForCausalLM.from_pretrained(Path(folder) / "baked", dtype=dtype).eval()
            ids = torch.tensor([sequences[0]])
            options = {"do_sample": False, "max_new_tokens": 48}
            with vectors.apply(model, multiplier):
                hooked = model.generate(ids, **options)
            report["same_generation"] = bool(torch.equal(hooked, baked.generate(ids, **options)))
            if dtype == torch.float32:
                found["speed"] = speed(model, baked, vectors, ids)
        found[str(dtype).removeprefix("torch.")] = {name: value for name, value in report.items() if name != "layers"}
    return found


def speed(
    model: PreTrainedModel, baked: PreTrainedModel, vectors: SteeringVectors, ids: torch.Tensor
) -> dict[str, Any]:
    """Time of a generation relative to plain `generate`, all of them taking turns."""
    config = ActivationConfig(vectors=vectors, multiplier=1.0, allow_backbone_mismatch=True)
    hooked, steered = copy.deepcopy(model), copy.deepcopy(model)

    def run(which: PreTrainedModel, turns: Turns, **extra: Any) -> None:
        which.generate(ids, do_sample=False, min_new_tokens=64, max_new_tokens=64, stopping_criteria=[turns], **extra)

    players = {
        "plain": partial(run, model),
        "hooks": partial(run, hooked),
        "generate(value_steer=)": partial(run, steered, custom_generate=value_steer_generate, value_steer=config),
        "baked": partial(run, baked),
    }
    with vectors.apply(hooked, 1.0):
        in_turns(*players.values())
        times = [in_turns(*players.values()) for _ in range(5)]
    found = {}
    for index, name in enumerate(players):
        ratios = sorted(sum(each[index]) / sum(each[0]) for each in times)
        found[name] = {"median": round(statistics.median(ratios), 4), "all": [round(ratio, 4) for ratio in ratios]}
    return found


def against(sweeper: Sweeper, one: str, other: str) -> dict[str, Any]:
    """The run `one` against the run `other`, on the same prompts: difference of rates, ratio of perplexities."""
    measures, runner = sweeper.measures, sweeper.runner
    rows = [measures.rows(runner.run(Setting(name, ""))) for name in (other, one)]
    rates = {
        name: compare_rates(rows[0]["verdicts"][name], rows[1]["verdicts"][name], measures.bootstrap)
        for name in JUDGES
    }
    return {"run": one, "against": other, "judges": rates, **compare_perplexity(*rows, measures.bootstrap)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="where the charts go")
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(torch.bfloat16)
    every = Collection(RUN / "collection").prompts
    prompts, others = (
        [prompt for prompt in every if unseen(prompt)],
        [prompt for prompt in every if not unseen(prompt)],
    )
    sequences, scaling = (
        [tokenizer(prompt.text)["input_ids"] for prompt in some]
        for some in (prompts, others[TEXTS : TEXTS + SCALING_TEXTS])
    )
    vectors = make_vectors(model, tokenizer, scaling)
    exact = load_backbone(torch.float32)[0]
    document: dict[str, Any] = {
        "command": command(),
        **describe(),
        "prompts": len(prompts),
        "generations": len(prompts) * SAMPLES,
        "vectors": vectors.provenance,
        "influence_on_calibration_texts": influence(exact, vectors, scaling),
        "influence_on_other_texts": influence(exact, vectors, sequences),
    }
    print(document, flush=True)
    head = ValueHead.from_pretrained(RUN / "evaluation" / f"fold-{FOLD}" / "head")
    runner = Runner(
        model, Formatter(tokenizer, False), prompts, SAMPLING, samples=SAMPLES, max_new_tokens=32,
        batch_size=len(prompts), seed=0, folder=WORK / "runs",
        conditions={"vectors": vectors.fingerprint(), "value_head": head.fingerprint()},
    )  # fmt: skip
    sweeper = Sweeper(runner, vectors, JUDGES, "python:examples.toxicity:mask_offensive")
    planned = [(m, "broadcast") for m in sorted(MULTIPLIERS, key=abs)]
    planned += [(m, "last_token") for m in (-STRONG, STRONG, -2 * STRONG, 2 * STRONG)]
    for multiplier, mode in planned:
        show(sweeper.run(multiplier, mode))
    for threshold in THRESHOLDS:
        for multiplier in (-STRONG, -2 * STRONG):
            show(gating(sweeper, head, multiplier, threshold))
    document |= sweeper.document(BUDGET)
    always = [f"broadcast m={-multiplier:g}" for multiplier in (STRONG, STRONG / 2)]
    gated = [f"gated m={-STRONG:g} c={c:g}" for c in THRESHOLDS]
    document["against"] = [against(sweeper, one, other) for one, other in itertools.product(gated, always)]
    document["baking"] = baking(vectors, STRONG, sequences[:8])
    if arguments.output:
        save(document, arguments.output)
    if arguments.page:
        arguments.page.write_text(sweep_page(document), encoding="utf-8")


def show(run: dict[str, Any]) -> None:
    rates = {
        name.rsplit(":", 1)[1]: (judge["rate"], judge["difference_interval"]) for name, judge in run["judges"].items()
    }
    print(run["name"], rates, "perplexity x", run["perplexity_ratio"], "distinct", run["distinct_2"],
          run.get("steered_steps", ""), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
