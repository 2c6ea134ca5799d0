"""Going back, against a search without a cache.

    python -m tests.going_back            # the whole grid
    python -m tests.going_back llama      # of some families
    python -m tests.going_back --types    # instead, every type that can be steered, on its dynamic cache

Every committed token and every value of seven families, with all caches, lazy and eager, alone and in a padded batch,
heads at the final state, at a layer and over time; what was taken back; what a streamer was shown; the text up to the
first dead end; then the cache that is left.
"""

import argparse
import itertools
import sys
import time
import warnings
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import set_seed
from transformers.generation import BaseStreamer

from hf_value_steer import UnsupportedError, ValueFilterConfig, value_steer_generate
from hf_value_steer.generation.families import VERIFIED
from tests.families import layered_head, prompts, random_head
from tests.layers import cache_arguments, goes_on
from tests.matrix import usable_prompts
from tests.rollback_oracle import GoingBack
from tests.tiny_models import MODEL_TYPES, build_tiny


FAMILIES = tuple("llama mistral gemma3_text qwen3 gpt2 lfm2 jamba".split())
SLIDING = ("mistral", "gemma3_text", "qwen3")  # their static layers overwrite what was before
HEADS = ((("final",), "none"), ((1,), "none"), ((0, 2), "mean"))
CACHES = ("dynamic", "block", "static", "compiled")
BACK = (1, 4, 8)
NEW_TOKENS, CANDIDATES = 14, 3
EOS = [2, *range(10, 22)]
# Thresholds at which searches find a way, at which they have to look for it, and at which most fail.
CALLS = ((0.55, 1), (0.45, 2), (0.35, 3))


class Case(NamedTuple):
    """Some steered calls."""

    family: str
    head: tuple[tuple[Any, ...], str]
    cache: str
    evaluation: str
    back: int
    rows: int

    def __str__(self) -> str:
        layers, temporal = self.head
        return "-".join(map(str, (self.family, *layers, temporal, *self[2:])))


GRID = [Case(*case) for case in itertools.product(FAMILIES, HEADS, CACHES, ("lazy", "eager"), BACK, (1, 5))]
SAMPLE = GRID[::13]  # every entry of every axis occurs: 13 divides the length of none


class Shown(BaseStreamer):
    """A streamer that counts how many tokens the text is ahead of it."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.tokens.append(None)


@cache
def model_of(family):
    model = build_tiny(family, 4)
    model.generation_config.pad_token_id = 0
    return model


@cache
def head_of(family, head):
    return layered_head(model_of(family), *map(_list, head))


def _list(entry):
    return list(entry) if isinstance(entry, tuple) else entry


def config_of(case, threshold, back):
    fallback = "abstain" if case.back == 4 else "argmin"
    return ValueFilterConfig(
        value_head=head_of(case.family, case.head), threshold=threshold, num_candidates=CANDIDATES, rollback=back,
        evaluation=case.evaluation, fallback=fallback, seed=3,
    )  # fmt: skip


def options_of(case):
    sampling = {"do_sample": True, "top_p": 0.95} if case.rows > 1 or case.back == 4 else {"do_sample": False}
    return {**sampling, "max_new_tokens": NEW_TOKENS, "eos_token_id": EOS if case.back != 4 else 2}


@cache
def expected(family, head, back, rows, threshold, seed):
    """What the oracle writes."""
    case = Case(family, head, "", "lazy", back, rows)
    oracle = GoingBack(config_of(case, threshold, back))
    set_seed(seed)
    with torch.no_grad():
        sequences = model_of(family).generate(**prompts(rows), **options_of(case), custom_generate=oracle)
    return sequences, oracle


def examine(case) -> Counter:
    """Check the calls of one case; returns what their searches came across."""
    if case.family in SLIDING and case.cache in ("static", "compiled"):
        with pytest.raises(UnsupportedError, match="StaticSlidingWindowLayer of 8 tokens"):
            steer(case, config_of(case, 0.5, case.back))
        return Counter()
    seen = Counter()
    for threshold, seed in CALLS:
        seen += compare(case, threshold, seed)
    return seen


def steer(case, config, seed=0, streamer=None):
    model, inputs = model_of(case.family), prompts(case.rows)
    set_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs, **options_of(case), **cache_arguments(model, case.cache), return_dict_in_generate=True,
            custom_generate=value_steer_generate, value_steer=config, token_streamer=streamer,
        )  # fmt: skip


def compare(case, threshold, seed):
    sequences, oracle = expected(case.family, case.head, case.back, case.rows, threshold, seed)
    streamer = Shown()
    out = steer(case, config_of(case, threshold, case.back), seed, streamer)
    assert torch.equal(out.sequences, sequences), "other tokens"
    assert torch.equal(
        torch.stack(streamer.tokens[1:-1], dim=1), out.sequences[:, prompts(case.rows)["input_ids"].shape[1] :]
    )
    for row in oracle.rows:
        number, count = row.number, len(row.taken)
        values = out.token_values[number, : len(row.values)]
        torch.testing.assert_close(values, torch.tensor(row.values), rtol=0, atol=1e-4)
        changed = [token != natural for token, natural in zip(row.tokens, row.natural, strict=True)]
        assert out.interventions[number, : len(changed)].tolist() == changed
        taken = zip(
            out.taken_back_steps[number, :count].tolist(), out.taken_back_tokens[number, :count].tolist(), strict=True
        )
        assert list(taken) == [(step, token) for step, token, _ in row.taken]
        assert (out.taken_back_steps[number, count:] == -1).all()
    goes_on(model_of(case.family), prompts(case.rows), out)
    seen = Counter(oracle.seen)
    if case.family in SLIDING:  # the prompt alone is longer than the window
        seen["across a full window"] = oracle.seen["found"]
    return seen


def examine_type(model_type) -> Counter:
    """The same for a tiny model of a type: every token of a few texts, lazy and eager."""
    model, seen = build_tiny(model_type), Counter()
    if model.config.model_type not in VERIFIED:
        return seen
    inputs, _ = usable_prompts(model)
    options = {**inputs, "do_sample": True, "top_p": 0.95, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    for threshold, evaluation in itertools.product((0.5, 0.35), ("lazy", "eager")):
        how = {"threshold": threshold, "num_candidates": CANDIDATES, "rollback": 4, "seed": 3}
        config = ValueFilterConfig(value_head=random_head(model), evaluation=evaluation, **how)
        oracle = GoingBack(config)
        set_seed(1)
        with torch.no_grad():
            expected = model.generate(**options, custom_generate=oracle)
        set_seed(1)
        out = model.generate(**options, custom_generate=value_steer_generate, value_steer=config)
        assert torch.equal(out[:, -NEW_TOKENS:], expected[:, -NEW_TOKENS:]), "other tokens"
        seen += Counter(oracle.seen)
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--types", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start, done, failed, seen = time.monotonic(), 0, 0, Counter()
    cases = [case for case in GRID if not arguments.families or case.family in arguments.families]
    for case in MODEL_TYPES if arguments.types else cases:
        try:
            seen += examine_type(case) if arguments.types else examine(case)
        except Exception as error:
            failed += 1
            print(case, type(error).__name__, " ".join(str(error).split())[:200], flush=True)
        done += 1
    print(f"{done} cases, {failed} failed, {time.monotonic() - start:.0f} s; {dict(seen)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
