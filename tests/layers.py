"""Heads on any layers, and over time, against the cache-free oracle.

    python -m tests.layers            # the whole grid
    python -m tests.layers llama      # of some families

Every committed token and every value of twelve families, with all caches, lazy and eager, alone and in a padded batch;
then the cache that is left, and the text that goes on from it, are those of a fresh prefill.
"""

import argparse
import itertools
import sys
import time
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CompileConfig, set_seed

from hf_value_steer import ValueFilterConfig, value_steer_generate
from hf_value_steer.hosts.transformers import CACHE
from tests.families import layered_head, prompts
from tests.matrix import named_cache
from tests.oracle import Oracle
from tests.tiny_models import build_tiny


FAMILIES = tuple("llama mistral qwen3 gemma2 gemma3_text gpt2 opt bloom mixtral phi3 lfm2 jamba".split())
DEPTH = 4
LAYERS = ((0,), (1,), (2,), ("final",), (0, 2))
TEMPORAL = ("none", "mean", "ema")
CACHES = ("dynamic", "block", "static", "compiled")
NEW_TOKENS, CANDIDATES = 12, 4
SEEDS = {"gemma3_text": 6}  # by default 5, with which two of its candidates tie at a dead end, to 1e-6
SAMPLING = {"do_sample": True, "top_p": 0.95, "max_new_tokens": NEW_TOKENS}
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}


class Case(NamedTuple):
    """One steered call."""

    family: str
    layers: tuple[Any, ...]
    temporal: str
    cache: str
    evaluation: str
    rows: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


GRID = [Case(*case) for case in itertools.product(FAMILIES, LAYERS, TEMPORAL, CACHES, ("lazy", "eager"), (1, 5))]


SAMPLE = GRID[::13]  # every entry of every axis occurs: 13 divides the length of none


@cache
def model_of(family):
    return build_tiny(family, DEPTH)


@cache
def head_of(family, layers, temporal):
    return layered_head(model_of(family), list(layers), temporal)


@cache
def expected(family, layers, temporal, rows):
    """What the oracle writes: sequences, values, interventions."""
    config = _config(Case(family, layers, temporal, "", "lazy", rows))
    oracle = Oracle(config)
    set_seed(SEEDS.get(family, 5))
    with torch.no_grad():
        sequences = model_of(family).generate(**prompts(rows), **_options(rows), custom_generate=oracle)
    return sequences, oracle.values, oracle.interventions


def _options(rows):
    return SAMPLING if rows > 1 else GREEDY


def cache_arguments(model, name):
    """Arguments of `generate` for a cache of that name; with `"compiled"`, a static one and compiled steps."""
    if name != "compiled":
        return named_cache(model, name)
    torch._dynamo.reset()  # the graphs of few models are kept
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def _config(case):
    head = head_of(case.family, case.layers, case.temporal)
    return ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=CANDIDATES, evaluation=case.evaluation)


def examine(case) -> int:
    """Check one call; returns the number of interventions of the oracle."""
    sequences, values, interventions = expected(case.family, case.layers, case.temporal, case.rows)
    model, inputs = model_of(case.family), prompts(case.rows)
    set_seed(SEEDS.get(case.family, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steering = {"custom_generate": value_steer_generate, "value_steer": _config(case)}
        options = {**_options(case.rows), **cache_arguments(model, case.cache), "return_dict_in_generate": True}
        out = model.generate(**inputs, **options, **steering)
    assert torch.equal(out.sequences, sequences), "other tokens"
    for row, wanted in enumerate(values):
        torch.testing.assert_close(out.token_values[row, : len(wanted)], torch.tensor(wanted), rtol=0, atol=1e-4)
    goes_on(model, inputs, out)
    return sum(map(sum, interventions))


@torch.no_grad()
def goes_on(model, inputs, out):
    """The cache that is left gives the logits that a fresh prefill gives."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.sequences[:, inputs["input_ids"].shape[1] :])], 1)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"eos_token_id": None, "attention_mask": mask}
    fresh = model.generate(out.sequences, **options)
    going = model.generate(out.sequences, **options, **{CACHE: out[CACHE]})
    torch.testing.assert_close(going.logits[0], fresh.logits[0], rtol=1e-3, atol=1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start, done, failed, seen = time.monotonic(), 0, 0, {}
    for case in GRID:
        if arguments.families and case.family not in arguments.families:
            continue
        try:
            seen[case.family, case.layers, case.temporal, case.rows] = examine(case)
        except Exception as error:
            failed += 1
            print(case, type(error).__name__, " ".join(str(error).split())[:200], flush=True)
        done += 1
    print(f"{done} calls, {failed} failed, {sum(seen.values())} interventions, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
