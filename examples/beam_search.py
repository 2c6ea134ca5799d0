"""Beam search, or whatever else takes a logits processor: candidates that are not acceptable get a score of -inf.

In a checkout, after `make demo`: `python -m examples.beam_search`
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.toxicity import mask_offensive
from hf_value_steer import ValueFilterConfig, ValueFilterLogitsProcessor


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument(
    "--value-head", default="model_cards/smollm2-135m-toxicity-final", help="folder or Hub id of its head"
)
parser.add_argument("--new-tokens", type=int, default=16)
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
inputs = tokenizer("My dear, I don't give a", return_tensors="pt")
beams = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": arguments.new_tokens}

# `value_steer=` is for sampling and greedy search. A processor takes part in any search, and needs no
# `enable_value_steer`. It looks at all K candidates of every beam at every step, so it costs more.
cfg = ValueFilterConfig(value_head=arguments.value_head, num_candidates=8, proposal="topk")
processor = ValueFilterLogitsProcessor(model, cfg)

for name, processors in {"plain": [], "steered": [processor]}.items():
    sequences = model.generate(**inputs, **beams, logits_processor=processors)
    for rank, text in enumerate(tokenizer.batch_decode(sequences, skip_special_tokens=True), start=1):
        print(f"{name:8} beam {rank}: {mask_offensive(text)!r}")
