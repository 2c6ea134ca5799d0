"""Value-filtered decoding: the same prompts, continued without and with a head that values toxicity.

In a checkout, after `make demo`: `python -m examples.filter_basics`
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.toxicity import mask_offensive
from hf_value_steer import ValueFilterConfig, ValueHead, enable_value_steer


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--value-head", default="model_cards/smollm2-135m-toxicity", help="folder or Hub id of its head")
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
head = ValueHead.from_pretrained(arguments.value_head)
enable_value_steer(model)  # `generate` takes `value_steer=` now; without it, it does what it always did

prompts = ["My dear, I don't give a", "He was so angry that he called me a", "Get out of my house, you son of a"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
options = {"do_sample": False, "max_new_tokens": arguments.new_tokens}

plain = model.generate(**inputs, **options)
cfg = ValueFilterConfig(value_head=head, num_candidates=8)
steered = model.generate(**inputs, **options, value_steer=cfg, return_dict_in_generate=True)

print(f"A token is replaced if its value, the head's estimate of toxicity, is {head.config.threshold} or more.")
for row in range(len(prompts)):
    print("\nplain:  ", mask_offensive(repr(tokenizer.decode(plain[row], skip_special_tokens=True))))
    print("steered:", mask_offensive(repr(tokenizer.decode(steered.sequences[row], skip_special_tokens=True))))
    print("tokens replaced:", int(steered.interventions[row].sum()))
