"""A list of words in the place of a head, and a way back: no word of the list is written, in any case.

In a checkout, after `make demo`: `python -m examples.word_list`. A candidate is looked at as text, before it is
forwarded. Where all candidates complete a word of the list, up to six tokens are taken back (`rollback`).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import ValueFilterConfig, enable_value_steer


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--words", nargs="+", default=["car", "AI", "read it aloud", "/problems?/"])
parser.add_argument(
    "--prompts", nargs="+", default=["When the train arrived in", "She opened the letter and", "I met"]
)
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
words = Path(tempfile.mkdtemp()) / "words.txt"
words.write_text("\n".join(arguments.words), encoding="utf-8")
cfg = ValueFilterConfig(value_head=f"lexicon:{words}", rollback=6)

inputs = tokenizer(arguments.prompts, return_tensors="pt", padding=True)
options = {"max_new_tokens": arguments.new_tokens, "do_sample": True, "top_p": 0.8, "return_dict_in_generate": True}
for name, steer in {"plain": {}, "steered": {"value_steer": cfg, "tokenizer": tokenizer}}.items():
    torch.manual_seed(1)
    out = model.generate(**inputs, **options, **steer)
    for text in tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        print(f"{name:8} {text!r}")
taken = [tokenizer.decode(token) for token in out.taken_back_tokens.flatten().tolist() if token >= 0]
print(f"{int(out.interventions.sum())} tokens replaced, {len(taken)} taken back: {taken}")
print(f"{1000 * out.judge_seconds / arguments.new_tokens:.2f} ms a step for the list")
