"""Dynamic abstention: answer the problems that will probably come out right, and stop early at the others.

In a checkout, after `make demo`: `python -m examples.abstention`
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.arithmetic import eval_problems, last_number
from hf_value_steer import AbstentionConfig, ValueHead, enable_value_steer


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--value-head", default="model_cards/smollm2-135m-arithmetic", help="folder or Hub id of its head")
parser.add_argument("--problems", type=int, default=12)
arguments = parser.parse_args()

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
head = ValueHead.from_pretrained(arguments.value_head)  # here a high value is good: the answer will be right

problems = eval_problems()[: arguments.problems]  # sums, differences, products; the head was not trained on them
chats = [problem["prompt"] for problem in problems]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
)
length, options = inputs["input_ids"].shape[1], {"do_sample": False, "max_new_tokens": 24}

plain = model.generate(**inputs, **options)
cfg = AbstentionConfig(value_head=head)
steered = model.generate(**inputs, **options, value_steer=cfg, return_dict_in_generate=True)

print(f"A text is ended as soon as its value is {head.config.threshold:.2f} or less. What it would have said:")
for row, problem in enumerate(problems):
    answer = tokenizer.decode(plain[row, length:], skip_special_tokens=True)
    verdict = "right" if last_number(answer) == int(problem["answer"]) else "wrong"
    stopped = f"stopped at token {steered.abstention_step[row]}, value {steered.abstention_value[row]:.2f}"
    print(f"{answer.strip():24} {verdict:8}{stopped if steered.abstained[row] else 'answered'}")
