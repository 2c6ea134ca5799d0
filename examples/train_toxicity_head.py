"""Train the toxicity value head of SmolLM2-135M-Instruct, from prompts to a saved head, offline and on a CPU.

    python examples/train_toxicity_head.py

1. Continue every training prompt several times and keep the decode-time feature of each generated token; once as the
   model would, and once with a word of the label judge's own vocabulary forced into each continuation, because the
   model's own offences are too few to learn from.
2. Let the label judge read the last words of every prefix. A token's label is the rise of the score at it, or later in
   the same word: a dense "hazard" label that tells the filter where to act, as the label of the whole text cannot. The
   rise itself is the target, not a yes or no: severe words get the high values.
3. Fit the head, stop early on natural tokens of held-out training prompts, and put the threshold where a set share of
   them lies above it.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from profanity_check.profanity_check import vectorizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from examples.smollm2 import BACKBONE_ID, load_backbone
from examples.toxicity import SAMPLING, load_prompts, profanity_score, until_end
from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.backbone import fingerprint


NEW_TOKENS = 32
CONTEXT = 3  # words that the label judge reads: enough for a phrase, and one offence does not hide the next
DISLIKED = 0.3  # score of a single word from which it is worth forcing into a text
HELD_OUT = 0.15  # share of the training prompts that stop the training and set the threshold
PROMPTS = 20  # in one call of `generate`
BATCH = 512  # tokens in one training step


@dataclass
class Tokens:
    """`N` generated tokens."""

    features: Tensor  # (N, H) float32: what the output embedding consumed once the token had been read
    labels: Tensor  # (N,) float32 in [0, 1]: rise of the judge's score at this word
    prompts: Tensor  # (N,) index of the prompt

    def where(self, keep: Tensor) -> Tokens:
        """The tokens at which `keep` (N,) is true."""
        return Tokens(self.features[keep], self.labels[keep], self.prompts[keep])


def join(parts: list[Tokens]) -> Tokens:
    """All tokens of all parts."""
    return Tokens(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def judged_words(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the words in the label judge's vocabulary that it dislikes when they stand alone."""
    words = [word for word in vectorizer.vocabulary_ if word.isalpha() and 3 <= len(word) <= 15]
    return [tokenizer(f" {words[index]}")["input_ids"] for index in np.flatnonzero(profanity_score(words) > DISLIKED)]


class Inject(LogitsProcessor):
    """Forces a random one of `words` into every row, at a random step.

    Attributes:
        forced (`torch.BoolTensor` of shape `(rows, NEW_TOKENS)`): pieces of the word but its last, which say nothing
            about what the model would have written next.
    """

    def __init__(self, words: list[list[int]], rows: int, prompt_length: int):
        self.words = [words[index] for index in torch.randint(len(words), (rows,)).tolist()]
        self.starts = torch.randint(1, NEW_TOKENS - 8, (rows,)).tolist()
        self.prompt_length = prompt_length
        self.forced = torch.zeros(rows, NEW_TOKENS, dtype=torch.bool)
        for row, (word, start) in enumerate(zip(self.words, self.starts, strict=True)):
            self.forced[row, start : start + len(word) - 1] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores, step = scores.clone(), input_ids.shape[1] - self.prompt_length
        for row, (word, start) in enumerate(zip(self.words, self.starts, strict=True)):
            if start <= step < start + len(word):
                scores[row] = -torch.inf
                scores[row, word[step - start]] = 0.0
        return scores


def hazard_labels(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> Tensor:
    """Labels (B, T) of continuations (B, T): rise of the judge's score at the token or later in its word."""
    columns = []
    for end in range(1, tokens.shape[1] + 1):
        prefixes = tokenizer.batch_decode(tokens[:, :end], skip_special_tokens=True)
        columns.append(profanity_score([" ".join(prefix.split()[-CONTEXT:]) for prefix in prefixes]))
    labels = torch.from_numpy(np.stack(columns, axis=1)).float().diff(dim=1, prepend=torch.zeros(len(tokens), 1))
    continues = [[piece[:1].isalnum() for piece in tokenizer.batch_decode(row[:, None])] for row in tokens]
    for step in reversed(range(labels.shape[1] - 1)):
        later = labels[:, step + 1] * torch.tensor([row[step + 1] for row in continues])
        labels[:, step] = torch.maximum(labels[:, step], later)
    return labels.clamp(min=0)


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    samples: int,
    words: list[list[int]] | None = None,
) -> Tokens:
    """Plain continuations (no chat template), `samples` per prompt, with the features that decoding sees."""
    parts = []
    for start in range(0, len(prompts), PROMPTS):
        batch = tokenizer(prompts[start : start + PROMPTS], return_tensors="pt", padding=True)
        rows, length = len(batch["input_ids"]) * samples, batch["input_ids"].shape[1]
        inject = Inject(words, rows, length) if words else None
        # A token's feature appears when the next token is about to be chosen: one more is generated than is kept.
        output = model.generate(
            **batch, **SAMPLING, num_return_sequences=samples, max_new_tokens=NEW_TOKENS + 1,
            logits_processor=[inject] if inject else None,
            return_dict_in_generate=True, output_hidden_states=True,
        )  # fmt: skip
        features = torch.stack([layers[-1][:, -1] for layers in output.hidden_states[1:]], dim=1)
        tokens = output.sequences[:, length:-1]
        keep = until_end(tokens, tokenizer.eos_token_id)
        if inject:
            keep &= ~inject.forced[:, : tokens.shape[1]]
        owner = torch.arange(start, start + len(batch["input_ids"])).repeat_interleave(samples)
        labels = hazard_labels(tokenizer, tokens)
        parts.append(Tokens(features[keep].float(), labels[keep], owner[:, None].expand_as(tokens)[keep]))
        print(f"{start + len(batch['input_ids'])}/{len(prompts)} prompts", flush=True)
    return join(parts)


def fit(net: nn.Sequential, train: Tokens, held_out: Tokens, epochs: int = 8, patience: int = 2) -> None:
    """Train `net` in place on standardised features, keep the best epoch on `held_out`, and fold the scaling in."""
    mean, scale = train.features.mean(0), train.features.std(0)
    inputs, held_out_inputs = (train.features - mean) / scale, (held_out.features - mean) / scale
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    batches = -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=epochs * batches, pct_start=0.1)
    best_loss, best_epoch, best_weights = float("inf"), 0, net.state_dict()
    for epoch in range(epochs):
        for index in torch.randperm(len(inputs)).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(net(inputs[index]).squeeze(-1), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = F.binary_cross_entropy_with_logits(net(held_out_inputs).squeeze(-1), held_out.labels).item()
        print(f"epoch {epoch}: held-out loss {loss:.4f}")
        if loss < best_loss:
            best_loss, best_epoch, best_weights = loss, epoch, deepcopy(net.state_dict())
        elif epoch - best_epoch >= patience:
            break
    net.load_state_dict(best_weights)
    with torch.no_grad():
        net[0].weight /= scale
        net[0].bias -= net[0].weight @ mean


def train_head(config: ValueHeadConfig, train: Tokens, held_out: Tokens, rejected: float) -> ValueHead:
    """A fitted head whose threshold rejects a share `rejected` of the held-out natural tokens."""
    head = ValueHead(config)
    fit(head.net, train, held_out)
    with torch.no_grad():
        values = head(held_out.features).values
    config.threshold = round(torch.quantile(values, 1 - rejected).item(), 4)
    print(f"threshold {config.threshold}")
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toxicity value head.")
    parser.add_argument("--output", default="model_cards/smollm2-135m-toxicity", help="folder of the saved head")
    parser.add_argument("--samples", type=int, default=6, help="continuations of each prompt, of each kind")
    parser.add_argument("--rejected", type=float, default=0.06, help="share of natural tokens to reject")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    start = time.perf_counter()
    torch.manual_seed(arguments.seed)
    model, tokenizer = load_backbone(torch.bfloat16)
    prompts = load_prompts("train")
    config = ValueHeadConfig(
        hidden_size=model.config.hidden_size,
        polarity="undesirable",
        attribute="toxicity",
        backbone=BACKBONE_ID,
        backbone_fingerprint=fingerprint(model),
        feature_dtype="bfloat16",
        chat_template="none",
        training={name: getattr(arguments, name) for name in ("samples", "rejected", "seed")},
    )
    natural = collect(model, tokenizer, prompts, arguments.samples)
    injected = collect(model, tokenizer, prompts, arguments.samples, judged_words(tokenizer))
    torch.manual_seed(arguments.seed)
    held_out = torch.randperm(len(prompts)) < HELD_OUT * len(prompts)
    train = join([part.where(~held_out[part.prompts]) for part in (natural, injected)])
    head = train_head(config, train, natural.where(held_out[natural.prompts]), arguments.rejected)
    head.save_pretrained(arguments.output)
    print(f"saved to {arguments.output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
