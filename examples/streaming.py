"""Streaming: a token reaches the streamer after it was checked, so what is shown is never taken back.

In a checkout, after `make demo`: `python -m examples.streaming`
"""

import argparse
import threading

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from hf_value_steer import ValueFilterConfig, enable_value_steer


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct", help="folder or Hub id of the model")
parser.add_argument("--value-head", default="model_cards/smollm2-135m-sentiment", help="folder or Hub id of its head")
parser.add_argument("--new-tokens", type=int, default=24)
arguments = parser.parse_args()

model = enable_value_steer(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"))
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
inputs = tokenizer("I saw this film last night, and honestly, it was", return_tensors="pt")
options = {"do_sample": False, "max_new_tokens": arguments.new_tokens}
cfg = ValueFilterConfig(value_head=arguments.value_head)  # this head values negative sentiment

for name, steering in {"plain": {}, "steered": {"value_steer": cfg}}.items():
    streamer = TextIteratorStreamer(tokenizer)
    # The model writes in a thread of its own, and we read in this one. An error in there ends the loop below, too.
    writer = threading.Thread(target=model.generate, kwargs={**inputs, **options, **steering, "streamer": streamer})
    writer.start()
    print(f"{name}: ", end="")
    for piece in streamer:
        print(piece.replace("\n", " "), end="", flush=True)
    writer.join()
    print()
