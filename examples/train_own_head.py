"""A head of your own, step by step in Python: text without numbers, from a word list and the openings of some texts.

In a checkout, after `make demo`: `python -m examples.train_own_head`, which takes a minute or two.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import ValueFilterConfig, enable_value_steer
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.training import CollectArguments, LabelArguments
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.collect import collect
from hf_value_steer.training.train import train


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--value-head", default="runs/no-numbers/head", help="folder of the head that is made")
parser.add_argument("--prompts", type=int, default=80, help="how many of the openings are for training")
parser.add_argument("--new-tokens", type=int, default=16)
arguments = parser.parse_args()

openings = Path("examples/recipes/openings.txt")
made = {"collection": f"{arguments.value_head}-collection", "judge": "lexicon:examples/recipes/numbers.txt"}

# 1. The model continues every opening four times; the word list says which texts, and which words, hold a number.
texts = {"model": arguments.model, "dtype": "float32", "prompts": str(openings), "limit": arguments.prompts}
sizes = {"samples": 4, "max_new_tokens": arguments.new_tokens, "next_tokens": 16}
collect(
    CollectArguments(**texts, **sizes, output=made["collection"]),
    LabelArguments(judges=[made["judge"]], prefixes=True, prefix_words=1),
)
# 2. The head learns from hidden states when a number is about to come. A head that learned nothing is refused.
shares = {"validation": 0.25, "calibration": 0.25}
train(TrainArguments(**made, output=arguments.value_head, attribute="a number", preset="hazard", **shares))
# 3. The threshold, on prompts that training never saw: of the texts without a number, one in five may be touched.
calibrate(CalibrateArguments(**made, value_head=arguments.value_head, alpha=0.2))

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
inputs = tokenizer(openings.read_text(encoding="utf-8").splitlines()[-4:], return_tensors="pt", padding=True)
cfg = ValueFilterConfig(value_head=arguments.value_head)
for name, options in {"plain": {}, "steered": {"value_steer": cfg}}.items():
    sequences = model.generate(**inputs, **options, do_sample=False, max_new_tokens=arguments.new_tokens)
    for text in tokenizer.batch_decode(sequences, skip_special_tokens=True):
        print(f"{name:8} {text!r}")
