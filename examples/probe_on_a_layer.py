"""A probe on a middle layer becomes a filter that decides there: text without numbers.

In a checkout, after `make demo`: `python -m examples.probe_on_a_layer`, which takes half a minute. The probe is
fitted by least squares on what the model itself has written; any linear probe, also scikit-learn's, is taken over like
this.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import ValueFilterConfig, ValueHead, enable_value_steer


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--layer", type=int, default=11, help="decoder layer, counted from 0")
parser.add_argument("--prompts", type=int, default=60, help="how many of the openings are for training")
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
openings = Path("examples/recipes/openings.txt").read_text(encoding="utf-8").splitlines()[: arguments.prompts + 4]
options = {"max_new_tokens": arguments.new_tokens, "do_sample": True, "top_p": 0.95}

torch.manual_seed(0)
inputs = tokenizer(openings[: arguments.prompts], return_tensors="pt", padding=True)
text = model.generate(**inputs, **options, num_return_sequences=2)
length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"].repeat_interleave(2, dim=0)
mask = torch.cat([mask, torch.ones_like(text[:, length:])], dim=1)
with torch.no_grad():
    states = model(text, attention_mask=mask, output_hidden_states=True).hidden_states[arguments.layer + 1]
digits = [[bool(re.search(r"\d", tokenizer.decode(token))) for token in row] for row in text[:, length:]]
# A token before a number counts, too: with it the number is as good as written.
after = torch.nn.functional.pad(torch.tensor(digits)[:, 1:], (0, 1))
numbers = torch.tensor(digits) | after
features, labels = states[:, length:].flatten(0, 1), numbers.flatten().float()
print(f"{len(labels)} tokens, {int(labels.sum())} of them in or before a number")

mean, scale = features.mean(0), features.std(0)
standard = torch.nn.functional.pad((features - mean) / scale, (0, 1), value=1.0)
ridge = standard.T @ standard + 100 * torch.eye(standard.shape[1])
solution = torch.linalg.solve(ridge, standard.T @ (2 * labels - 1))
weight = 4 * solution[:-1] / scale  # log odds: any factor, as long as the threshold is chosen with it
head = ValueHead.from_linear(
    weight, 4 * float(solution[-1]) - float(weight @ mean), layer=arguments.layer, polarity="undesirable"
)

inputs = tokenizer(openings[-4:], return_tensors="pt", padding=True)
cfg = ValueFilterConfig(value_head=head, threshold=0.4)
for name, steer in {"plain": {}, "steered": {"value_steer": cfg}}.items():
    torch.manual_seed(1)
    sequences = model.generate(**inputs, **options, **steer)
    for text in tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        print(f"{name:8} {text!r}")
