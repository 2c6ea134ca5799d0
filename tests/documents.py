"""Evaluation and calibration documents made up for tests: plausible numbers that nobody measured."""

import math
import random
from typing import Any


LABELS = "judge that labelled"
JUDGES = ["lexicon", "classifier of another kind", LABELS]
HEAD = {
    "attribute": "toxicity",
    "polarity": "undesirable",
    "threshold": 0.1,
    "backbone": "org/base-model",
    "backbone_fingerprint": "0123456789abcdef",
}
_WORDS = "the old house stood at the end of a long and very quiet street where nobody had lived for some years".split()


def _around(value: float, width: float) -> list[float]:
    return [round(max(value - width, 0.0), 4), round(value + width, 4)]


def run(name: str, method: str, left: float = 1.0, cost: float = 1.0, **more: Any) -> dict[str, Any]:
    """One run: the share of the base's rate that is left, and the factor on perplexity that it costs."""
    judges = {}
    for index, judge in enumerate(JUDGES):
        before = (0.106, 0.076, 0.112)[index]
        rate = round(before * min(left + 0.04 * index, 1.1), 4)
        judges[judge] = {
            "rate": rate,
            "rate_interval": _around(rate, 0.4 * rate**0.5 / 5),
            "difference_interval": [round(rate - before - 0.03, 4), round(rate - before + 0.03, 4)],
            "relative_reduction": round(1 - rate / before, 4),
            "relative_reduction_interval": [round(0.7 - rate / before, 4), round(min(1.2 - rate / before, 1.0), 4)],
        }
    return {
        "name": name,
        "method": method,
        "num_candidates": None,
        "threshold": None,
        "judges": judges,
        "perplexity": round(20.3 * cost, 1),
        "perplexity_ratio": cost,
        "perplexity_ratio_interval": None if method == "base" else [round(cost - 0.03, 4), round(cost + 0.035, 4)],
        "distinct_1": 0.412,
        "distinct_2": 0.873,
        "identical_to_base": 1.0 if method == "base" else round(min(max(0.9 - (cost - 1) * 4, 0.05), 0.9), 3),
        "intervention_rate": None,
        "intervened_on_safe": None,
        "intervened_on_safe_interval": None,
        "abstention_rate": None,
        "tokens": 10880,
        "tokens_per_second": 148.2,
        **more,
    }


def _filter(candidates: int, threshold: float) -> dict[str, Any]:
    strength = math.exp(-threshold * 4) * (0.75 + candidates / 32)
    steps = round(0.1 * strength, 4)
    return run(
        f"filter K={candidates} c={threshold:g}",
        "filter",
        left=round(1 - strength, 4),
        cost=round(1 + 0.14 * strength**2, 4),
        num_candidates=candidates,
        threshold=threshold,
        intervention_rate=steps,
        intervened_on_safe=round(1.5 * steps, 4),
        intervened_on_safe_interval=_around(1.5 * steps, 0.03),
        tokens_per_second=96.4,
    )


def runs() -> list[dict[str, Any]]:
    """Base, a grid of filters, a placebo, and baselines."""
    found = [run("base", "base", intervention_rate=0.0, tokens_per_second=151.0)]
    found += [_filter(candidates, threshold) for candidates in (8, 4) for threshold in (0.05, 0.1, 0.2, 0.4)]
    found.append(run("placebo K=8", "placebo", 1.06, 1.065, num_candidates=8, threshold=0.31, intervention_rate=0.069))
    found += [
        run(f"best-of-{count}", "best_of_n", 1 - 0.16 * count**0.5, 1 - 0.01 * count, num_candidates=count)
        for count in (2, 4, 8)
    ]
    found.append(run("ARGS K=8", "args", 0.38, 1.19, num_candidates=8))
    found.append(run("system prompt", "system_prompt", 0.93, 1.31))
    found.append(run("bad words", "bad_words", 0.12, 1.02))
    return found


def calibration(
    mode: str = "pac", alphas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45)
) -> dict[str, Any]:
    """calibration.json without its scores; below alpha = 0.05 nothing is promised."""
    curve = [
        {"alpha": a, "threshold": None if a < 0.05 else round(0.62 - 0.25 * math.log(a / 0.05), 4)} for a in alphas
    ]
    return {
        "format": "hf-value-steer/calibration@1",
        "mode": mode,
        "polarity": "undesirable",
        "n": 59,
        "delta": 0.05,
        "guarantee": "A new safe text is intervened on with probability at most alpha, with confidence 95 %.",
        "curve": curve,
        "data": "ab" * 32,
        "sampling": {"do_sample": True, "temperature": 1.0, "top_p": 0.95},
        "kernel": "shared_prefix",
        "backend": "transformers 5.19.0, torch 2.13.0, bfloat16",
    }


def _tokens(seed: int, intervene: bool, words: int = 24) -> list[dict[str, Any]]:
    draw, tokens, logit = random.Random(seed), [], -4.0
    for step in range(words):
        logit = 0.75 * logit + draw.gauss(-0.8, 1.1) + (3.0 if step in (9, 10) else 0.0)
        value, text = 1 / (1 + math.exp(-logit)), f" {draw.choice(_WORDS)}"
        swapped = intervene and value >= HEAD["threshold"]
        candidates = [[text, round(value, 4)]]
        if swapped:
            logit = draw.gauss(-3.4, 0.4)
            candidates += [[" bad", 0.31], [" quite", round(1 / (1 + math.exp(-logit)), 4)]]
            text, value = candidates[-1]
        tokens.append({"text": text, "value": round(value, 4), "intervened": swapped, "candidates": candidates})
    return tokens


def examples() -> list[dict[str, Any]]:
    """Four prompts; the third is not touched."""
    return [
        {
            "prompt": f"Prompt number {seed}, which goes on",
            "base": _tokens(seed, False),
            "steered": _tokens(seed, touched),
        }
        for seed, touched in ((1, True), (2, True), (3, False), (4, True))
    ]


def masked(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same examples with the word "old" hidden."""

    def hide(text: str) -> str:
        return text.replace("old", "***")

    def side(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chips = [[[hide(text), value] for text, value in token["candidates"]] for token in tokens]
        return [{**t, "text": hide(t["text"]), "candidates": c} for t, c in zip(tokens, chips, strict=True)]

    return [
        {"prompt": hide(each["prompt"]), "base": side(each["base"]), "steered": side(each["steered"])}
        for each in shown
    ]


def evaluation(**changes: Any) -> dict[str, Any]:
    """A document in which every part holds data, with `changes` to its top level."""
    document: dict[str, Any] = {
        "format": "hf-value-steer/evaluation@1",
        "head": dict(HEAD),
        "sampling": {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0},
        "new_tokens": 32,
        "seed": 0,
        "prompts": 68,
        "generations": 340,
        "environment": {"device": "cpu", "dtype": "bfloat16", "torch": "2.13.0", "transformers": "5.19.0"},
        "judges": [{"name": judge, "gave_labels": judge == LABELS} for judge in JUDGES],
        "runs": runs(),
        "reliability": [
            {
                "lower": index / 10,
                "upper": (index + 1) / 10,
                "count": round(9000 * 0.45**index) or 1,
                "mean_value": index / 10 + 0.047,
                "rate": round((index / 10 + 0.04) ** 1.15, 4),
            }
            for index in range(8)
        ],
        "coverage": [
            {
                "coverage": step / 10,
                "accuracy": round(0.31 + 0.55 * (1 - step / 10) ** 1.4, 4),
                "accuracy_interval": _around(0.31 + 0.55 * (1 - step / 10) ** 1.4, 0.03 + 0.07 * (1 - step / 10)),
                "threshold": round(1 - step / 10, 2),
                "tokens_saved": round(0.8 * (1 - step / 10), 3),
            }
            for step in range(1, 11)
        ],
        "calibration": calibration(),
        "examples": examples(),
    }
    return {**document, **changes}


def sweep(*judges: str) -> dict[str, Any]:
    """What a sweep of multipliers found."""
    runs = [
        {
            "multiplier": m,
            "method": "broadcast" if m else "base",
            "judges": {judge: {"rate": rate, "rate_interval": [rate / 2, rate]} for judge in judges or JUDGES[:2]},
            "perplexity_ratio": ratio,
            "perplexity_ratio_interval": [0.9 * ratio, 1.1 * ratio],
            "collapsed": ratio > 1.5,
        }
        for m, rate, ratio in (
            (0.0, 0.1, 1.0),
            (-0.5, 0.06, 1.1),
            (-1.0, 0.02, 3.0),
            (1.0, 0.2, 1.2),
            (2.0, 0.3, 40.0),
        )
    ]
    found = {"runs": runs, "window": [-0.5, 1.0], "budget": 1.5, "layers": [4, 5, 6], "norms": [10.0, 20.0, 45.0]}
    return {**found, "model": "org/model", "attribute": "calm", "prompts": 12, "generations": 48}
