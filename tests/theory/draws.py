"""Draws of the library, and the law that they have to follow.

    python -m tests.theory.draws            # 20,000 texts of each case in batches, 2,000 in single calls

Prints p-values. The texts are short and the vocabulary is small, so that `tests/theory/laws.py` enumerates the law.
"""

import argparse
import itertools
import time
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig, enable_value_steer
from tests.theory.laws import Rule, hard, law, soft


VOCABULARY, LENGTH, PROMPT = 4, 3, (1, 3, 2)
THRESHOLD, BETA, SEED = 0.35, 3.0, 8
TEXTS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))


class Case(NamedTuple):
    """What is drawn."""

    rollback: int
    selection: str
    evaluation: str = "lazy"
    num_candidates: int = 2


GRID = [Case(1, "first", "lazy"), Case(2, "first", "eager"), Case(1, "soft", "eager"), Case(2, "soft", "lazy")]


@cache
def toy(seed=SEED):
    """A model and a head, the next-token law after each text, and the value of each text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model, head = LlamaForCausalLM(config).eval(), ValueHead(ValueHeadConfig(hidden_size=16, threshold=0.5))
    probabilities, values = {}, {}
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
        head.net[-1].weight.mul_(20)
        for length in range(LENGTH + 1):
            texts = list(itertools.product(range(VOCABULARY), repeat=length))
            states = model.base_model(torch.tensor([PROMPT + text for text in texts])).last_hidden_state[:, -1]
            probabilities |= zip(texts, model.lm_head(states).double().softmax(-1).numpy(), strict=True)
            values |= zip(texts, head(states).value.double().tolist(), strict=True)
    return enable_value_steer(model), head, probabilities, values


@cache
def expected(case):
    """The law of a case, in the order of `TEXTS`."""
    _, _, probabilities, values = toy()
    accept = hard(THRESHOLD) if case.selection == "first" else soft(THRESHOLD, BETA)
    texts = law(Rule(probabilities, values, accept, case.num_candidates, case.rollback), LENGTH)
    return np.array([texts[text] for text in TEXTS])


def drawn(case, calls, rows):
    """How often each text comes in so many calls, and in what share of texts a search was made, and found a way."""
    model, head, *_ = toy()
    config = ValueFilterConfig(
        value_head=head, threshold=THRESHOLD, beta=BETA, **{name: getattr(case, name) for name in case._fields}
    )
    prompt = torch.tensor([PROMPT]).expand(rows, -1)
    counts, found, searched = np.zeros(len(TEXTS)), 0, 0
    torch.manual_seed(0)  # each call goes on with the random numbers after those of the last one
    for _ in range(calls):
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH, do_sample=True, top_k=0,
            value_steer=config, return_dict_in_generate=True,
        )  # fmt: skip
        places = out.sequences[:, len(PROMPT) :] @ VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
        counts += np.bincount(places.numpy(), minlength=len(TEXTS))
        went_back = (out.taken_back_steps >= 0).any(dim=1)
        found += int(went_back.sum())
        searched += int((went_back | out.dead_ends[:, 1:].any(dim=1)).sum())
    return counts, searched / counts.sum(), found / counts.sum()


def p_value(counts, expected):
    """Chi-square, with the rare texts in one cell; 0 if a text has come that cannot."""
    if counts[expected < 1e-12].any():
        return 0.0
    wanted = expected * counts.sum()
    rare = wanted < 5
    cells, wanted = (np.append(each[~rare], each[rare].sum()) for each in (counts, wanted))
    kept = wanted > 0
    return float(chisquare(cells[kept], wanted[kept] * cells.sum() / wanted[kept].sum()).pvalue)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--singles", type=int, default=2_000)
    parser.add_argument("--case", type=int, help="only this one of the four")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in GRID if arguments.case is None else [GRID[arguments.case]]:
        start, wanted, without = time.monotonic(), expected(case), expected(case._replace(rollback=0))
        batches, searched, found = drawn(case, arguments.draws // 1000, 1000)
        line = f"batches p={p_value(batches, wanted):.3f}, without rollback {p_value(batches, without):.0e}"
        print(case, line, f"searched {searched:.3f}, found {found:.3f}, {time.monotonic() - start:.0f} s", flush=True)
        if arguments.singles:
            singles, *_ = drawn(case, arguments.singles, 1)
            line = f"p={p_value(singles, wanted):.3f}, without rollback {p_value(singles, without):.0e}"
            print(case, "single calls", line, f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
