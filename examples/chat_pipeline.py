"""Chat with a pipeline: model and head become one model, which `pipeline` takes like any other.

In a checkout, after `make demo`: `python -m examples.chat_pipeline`
"""

import argparse

from transformers import AutoTokenizer, pipeline

from examples.toxicity import mask_offensive
from hf_value_steer import ValueFilterConfig, ValueSteerForCausalLM


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument(
    "--value-head", default="model_cards/smollm2-135m-toxicity-final", help="folder or Hub id of its head"
)
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = ValueSteerForCausalLM.from_pretrained(
    arguments.model,
    value_head=arguments.value_head,
    value_steer=ValueFilterConfig(num_candidates=8),  # how every call of this model is steered
    dtype="float32",
)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
chats = {
    "plain": pipeline("text-generation", model=model.backbone, tokenizer=tokenizer),
    "steered": pipeline("text-generation", model=model, tokenizer=tokenizer),
}

messages = [{"role": "user", "content": "Write a rude joke about a stupid king."}]
for name, chat in chats.items():
    (answer,) = chat(messages, do_sample=False, max_new_tokens=arguments.new_tokens)
    print(f"{name}: {mask_offensive(answer['generated_text'][-1]['content'])!r}")
