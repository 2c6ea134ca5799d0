"""Steering vectors: find a direction in the hidden states, scale it to the model, and add it while text is generated.

In a checkout, after `make demo`: `python -m examples.steering_vectors`
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer.training import vectors_from_pairs


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--multipliers", type=float, nargs="+", default=[-0.25, 0.25, 0.5], help="how much, and which way")
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")

# Texts that differ in what is to be steered, and in little else. These are few; a few dozen pairs are better.
subjects = ["My day", "The film", "This town", "The soup", "Our trip", "Her song", "His house", "The weather"]
happy = [f"{subject} was wonderful, I loved every minute of it and felt so happy." for subject in subjects]
sad = [f"{subject} was terrible, I hated every minute of it and felt so sad." for subject in subjects]

vectors = vectors_from_pairs(model, tokenizer, happy, sad, pooling="mean", attribute="happy")
vectors = vectors.scale(model, [tokenizer(text)["input_ids"] for text in happy + sad])

inputs = tokenizer("When I woke up this morning, I", return_tensors="pt")
for multiplier in [0.0, *arguments.multipliers]:
    with vectors.apply(model, multiplier=multiplier):  # inside, whatever calls the model is steered
        output = model.generate(**inputs, do_sample=False, no_repeat_ngram_size=3, max_new_tokens=arguments.new_tokens)
    print(f"m {multiplier:+.2f}: {tokenizer.decode(output[0], skip_special_tokens=True)!r}")
