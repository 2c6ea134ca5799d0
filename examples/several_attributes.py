"""A head of two attributes, made by a recipe: text with neither numbers nor commas.

In a checkout, after `make demo`: `python -m examples.several_attributes`, which takes a minute or two.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import ValueFilterConfig, ValueHead, enable_value_steer
from hf_value_steer.recipe import run_recipe


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--output", default="runs/two-attributes", help="folder of what is collected and trained")
parser.add_argument("--prompts", type=int, default=80, help="how many of the openings are for training")
parser.add_argument("--new-tokens", type=int, default=16)
arguments = parser.parse_args()

output, openings = Path(arguments.output), Path("examples/recipes/openings.txt")
output.mkdir(parents=True, exist_ok=True)
(output / "comma.txt").write_text("/,/\n", encoding="utf-8")  # words, phrases, or regular expressions between slashes
judges = {"number": "lexicon:examples/recipes/numbers.txt", "comma": f"lexicon:{output / 'comma.txt'}"}

texts = {"model": arguments.model, "dtype": "float32", "prompts": str(openings), "limit": arguments.prompts}
sizes = {"samples": 4, "max_new_tokens": arguments.new_tokens, "next_tokens": 16}
settings = {"preset": "hazard", "validation": 0.25, "calibration": 0.3}
recipe = {  # the same as a YAML file is taken by `hf-value-steer run`
    "output": str(output),
    "collect": {**texts, **sizes},
    "label": {"judges": list(judges.values()), "prefixes": True, "prefix_words": 1},
    "train": {"attributes": [f"{name}={judge}" for name, judge in judges.items()], **settings},
    "calibrate": {"alpha": 0.4},  # of the texts that both judges find fine, so many may be touched
}
head = ValueHead.from_pretrained(run_recipe(recipe))
print("thresholds:", {each["name"]: each["threshold"] for each in head.config.attributes})

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
inputs = tokenizer(openings.read_text(encoding="utf-8").splitlines()[-4:], return_tensors="pt", padding=True)
cfg = ValueFilterConfig(value_head=head)  # one value for both: that of the attribute that is further beyond
for name, options in {"plain": {}, "steered": {"value_steer": cfg}}.items():
    sequences = model.generate(**inputs, **options, do_sample=False, max_new_tokens=arguments.new_tokens)
    for text in tokenizer.batch_decode(sequences, skip_special_tokens=True):
        print(f"{name:8} {text!r}")
