"""What the speed benchmarks share: a head with a prescribed rejection rate, and times taken in pairs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from benchmarks.baselines import repeated_cache
from hf_value_steer import BlockCache, ValueFilterConfig, ValueHead, ValueHeadConfig, value_steer_generate
from hf_value_steer.backbone import feature_width
from hf_value_steer.modeling import ValueHeadOutput


class RejectingHead(ValueHead):
    """A real MLP head whose values are then replaced: natural samples are rejected at `rate`, alternatives never.

    Natural samples are the features of shape `(rows, width)`, alternatives those of `(rows, K, width)`.
    """

    rate: float = 0.0

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> ValueHeadOutput:
        output = super().forward(hidden_states, labels)
        natural = hidden_states.dim() == 2
        draws = torch.rand(output.values.shape, generator=self.generator, device=output.values.device)
        output.values = torch.where(draws < (self.rate if natural else 0.0), 0.9, 0.1)
        return output


def make_head(model: PreTrainedModel, rate: float) -> RejectingHead:
    head = RejectingHead(ValueHeadConfig(hidden_size=feature_width(model), threshold=0.5)).to(model.device)
    head.rate, head.generator = rate, torch.Generator(model.device).manual_seed(0)
    return head


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: row of the table.
        batch, prompt, new_tokens: shape of the text; the prompt is in the cache before the clock starts.
        evaluation, rate, count, lookahead: of the filter; `rate` is the share of natural samples that is rejected.
        cache: `"dynamic"` or `"block"`, of the steered run.
        against: `"plain"` generate with its default cache, or the `"repeated"` cache baseline.
        limit (*optional*): what the ratio must not exceed.
    """

    name: str
    batch: int = 1
    prompt: int = 64
    new_tokens: int = 64
    evaluation: str = "lazy"
    rate: float = 0.0
    count: int = 8
    lookahead: str = "auto"
    cache: str = "dynamic"
    against: str = "plain"
    limit: float | None = None


class Prompt:
    """Random tokens, and a cache that holds all but the last of them."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int):
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.input_ids = torch.randint(vocabulary // 2, (batch, length), generator=generator).to(model.device)
        self.config, self.cache = model.config, DynamicCache(config=model.config)
        with torch.no_grad():
            model(self.input_ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)

    def inputs(self, kind: str) -> dict[str, Any]:
        """Arguments of `generate`, with a cache of its own."""
        cache: Cache = BlockCache(self.config) if kind == "block" else DynamicCache(config=self.config)
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "past_key_values": cache,
        }


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of `run`, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(model: PreTrainedModel, case: Case, pairs: int, prompt: Prompt | None = None) -> dict[str, Any]:
    """Times of `case` in pairs, reference then steered, after one pair that does not count."""
    prompt = prompt or Prompt(model, case.batch, case.prompt)
    head = make_head(model, case.rate)
    config = ValueFilterConfig(
        value_head=head, num_candidates=case.count, evaluation=case.evaluation, lookahead=case.lookahead
    )
    arguments = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "eos_token_id": None}
    arguments["max_new_tokens"] = case.new_tokens
    steer = {"custom_generate": value_steer_generate, "value_steer": config}
    rates = []

    def reference() -> float:
        inputs = prompt.inputs("dynamic")
        if case.against == "plain":
            return seconds(lambda: model.generate(**inputs, **arguments))
        cache = inputs["past_key_values"]
        count = case.count
        return seconds(lambda: repeated_cache.generate(model, head, prompt.input_ids, cache, case.new_tokens, count))

    def steered() -> float:
        inputs = prompt.inputs(case.cache)
        outputs = []
        taken = seconds(lambda: outputs.append(model.generate(**inputs, **arguments, **steer)))
        rates.append(outputs[0].interventions.float().mean().item())
        return taken

    torch.manual_seed(0)
    reference(), steered()
    times = [(reference(), steered()) for _ in range(pairs)]
    ratios = [mine / base for base, mine in times]
    tokens = case.new_tokens * case.batch
    return {
        **vars(case),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "intervention_rate": round(statistics.mean(rates[1:]), 4),
        "reference_tokens_per_second": round(tokens / statistics.median(base for base, _ in times), 1),
        "tokens_per_second": round(tokens / statistics.median(mine for _, mine in times), 1),
    }
