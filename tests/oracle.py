"""The slowest correct implementation of value-filtered decoding: no cache, no batch, one candidate at a time.

A `custom_generate` callable with the same arguments as `value_steer_generate`. It shares with the library the random
numbers of the alternatives, and nothing else.
"""

import math
from typing import Any

import torch

from hf_value_steer.backbone.parts import decoder_layers
from hf_value_steer.generation.candidates import another_key, random_key, uniforms


def states(model: Any, tokens: list[int], layers: Any) -> torch.Tensor:
    """What a head reads of each token of a text, in one forward without a cache, `(tokens, width)`."""
    found: dict[Any, torch.Tensor] = {}
    stack = [] if list(layers) == ["final"] else decoder_layers(model)

    def keep(layer: Any) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            found[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    final = model.get_output_embeddings()
    handles = [final.register_forward_pre_hook(lambda _, args: found.update(final=args[0].flatten(0, -2)))]
    handles += [stack[layer].register_forward_hook(keep(layer)) for layer in layers if layer != "final"]
    model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat([found[layer].float() for layer in layers], dim=-1)


class Oracle:
    """Collects what it decided: `values`, `interventions`, `tokens`, one list a row."""

    def __init__(self, config: Any):
        self.config, self.head = config.settled(config.value_head.config.operating_point), config.value_head
        self.values: list[list[float]] = []
        self.interventions: list[list[bool]] = []

    def value(self, model: Any, tokens: list[int], prompt: int) -> float:
        """Value of a text of which the first `prompt` tokens are the prompt."""
        head = self.head.config
        features = states(model, tokens, head.feature_layers)
        if head.temporal == "none":
            return float(torch.sigmoid(self.head.net(features[-1])))
        first, *rest = self.head.net
        projected = first(features[prompt - 1 :]).double()
        mean = projected[0]
        if head.temporal == "mean":
            mean = projected.mean(dim=0)
        else:
            for each in projected[1:]:
                mean = head.temporal_decay * mean + (1 - head.temporal_decay) * each
        return float(torch.sigmoid(torch.nn.Sequential(*rest)(mean.float())))

    def accepts(self, value: float, luck: float) -> bool:
        """By `luck`, uniform in [0, 1), under soft selection."""
        threshold = self.config.threshold
        sign = 1 if self.head.config.polarity == "undesirable" else -1
        excess = sign * (math.log(value / (1 - value)) - math.log(threshold / (1 - threshold)))
        if self.config.selection == "first":
            return excess < 0
        return luck < math.exp(min(0.0, -self.config.beta * excess))

    def badness(self, value: float, probability: float) -> float:
        base = value if self.head.config.polarity == "undesirable" else 1 - value
        return base - (self.config.prob_weight * probability if self.config.fallback == "args" else 0.0)

    def alternatives(self, scores: torch.Tensor, natural: int, uniform: torch.Tensor, do_sample: bool) -> list[int]:
        probabilities = scores.double().softmax(-1)
        if do_sample and self.config.proposal == "sample":
            drawn = []
            for number in uniform.tolist():
                total = 0.0
                for token, probability in enumerate(probabilities.tolist()):
                    total += probability
                    if total > number:
                        drawn.append(token)
                        break
            return drawn
        order = sorted(range(len(scores)), key=lambda token: -scores[token].item())
        allowed = [token for token in order if token != natural and scores[token] > -torch.inf]
        return allowed[: self.config.num_candidates - 1]

    def reweighed(
        self, model: Any, prefix: list[int], prompt: int, scores: torch.Tensor, natural: int, luck: list[float] | None
    ) -> tuple[int, float]:
        """One of the most likely tokens, by probability and value; the first number is the natural one's."""
        order = sorted(range(len(scores)), key=lambda token: -scores[token].item())
        tokens = [token for token in order if scores[token] > -torch.inf][: self.config.num_candidates]
        values = [self.value(model, [*prefix, token], prompt) for token in tokens]
        sign = 1 if self.head.config.polarity == "undesirable" else -1
        odds = [sign * math.log(value / (1 - value)) for value in values]
        weights = [scores[token].item() - self.config.beta * each for token, each in zip(tokens, odds, strict=True)]
        if luck is not None:
            own = [luck[0] if token == natural else luck[1 + place] for place, token in enumerate(tokens)]
            weights = [each - math.log(-math.log(number)) for each, number in zip(weights, own, strict=True)]
        best = max(range(len(tokens)), key=weights.__getitem__)
        return tokens[best], values[best]

    def commit(
        self,
        model: Any,
        prefix: list[int],
        prompt: int,
        scores: torch.Tensor,
        candidates: list[int],
        luck: list[float],
    ) -> tuple[int, float]:
        values = [self.value(model, [*prefix, candidate], prompt) for candidate in candidates]
        for candidate, value, own in zip(candidates, values, luck, strict=False):
            if self.accepts(value, own):
                return candidate, value
        if self.config.fallback == "abstain":
            return 2, self.value(model, [*prefix, 2], prompt)
        probabilities = scores.softmax(-1)
        scored = [self.badness(v, probabilities[c].item()) for c, v in zip(candidates, values, strict=True)]
        best = min(range(len(candidates)), key=scored.__getitem__)
        return candidates[best], values[best]

    def __call__(
        self, model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        mask = model_kwargs["attention_mask"]
        starts = [0] * len(input_ids) if mask is None else mask.argmax(dim=1).tolist()
        finished = [False] * len(input_ids)
        self.values, self.interventions = [[] for _ in finished], [[] for _ in finished]
        key, step = random_key(input_ids.device, self.config.seed), 0
        prompts = [input_ids.shape[1] - start for start in starts]
        while not all(finished):
            rows = [ids[start:].tolist() for ids, start in zip(input_ids, starts, strict=True)]
            logits = torch.stack([model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])
            scores = logits_processor(input_ids, logits)
            natural = scores.argmax(-1)
            if generation_config.do_sample:
                natural = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            tokens = []
            for row, prefix in enumerate(rows):
                if finished[row]:
                    tokens.append(0)
                    continue
                uniform = uniforms(key, [row], step, self.config.num_candidates - 1)[0]
                own = natural[row].item()
                others = self.alternatives(scores[row], own, uniform, generation_config.do_sample)
                luck = uniforms(another_key(key), [row], step, self.config.num_candidates + 1)[0].tolist()
                draws = generation_config.do_sample
                if self.config.selection == "soft" and not (draws and self.config.proposal == "sample"):
                    numbers = luck if draws else None
                    token, value = self.reweighed(model, prefix, prompts[row], scores[row], own, numbers)
                else:
                    token, value = self.commit(model, prefix, prompts[row], scores[row], [own, *others], luck)
                tokens.append(token)
                self.values[row].append(value)
                self.interventions[row].append(token != own)
            input_ids = torch.cat([input_ids, torch.tensor(tokens)[:, None]], dim=1)
            finished = [
                was or is_ for was, is_ in zip(finished, stopping_criteria(input_ids, None).tolist(), strict=True)
            ]
            step += 1
        return input_ids
