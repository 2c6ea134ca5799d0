"""What the speed benchmarks share: a head with a prescribed rejection rate, and times taken in pairs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StoppingCriteria

from benchmarks.baselines import repeated_cache
from hf_value_steer import BlockCache, ValueFilterConfig, ValueHead, ValueHeadConfig, value_steer_generate
from hf_value_steer.backbone.parts import feature_width
from hf_value_steer.heads.value_head import ValueHeadOutput
from hf_value_steer.hosts.transformers import CACHE


WARM_UP = 8  # tokens


class RejectingHead(ValueHead):
    """A real MLP head whose values are then replaced: natural samples are rejected at `rate`, alternatives never.

    Of every `1 / rate` natural samples of a row it rejects one, at a random place, so that even short texts have the
    rate that they should. Natural samples are the features of shape `(rows, width)`, alternatives those of
    `(rows, K, width)`.
    """

    rate: float = 0.0
    step: int = -1  # the first value is that of the prompt

    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None, memory: Tensor | None = None
    ) -> ValueHeadOutput:
        output = super().forward(hidden_states, labels, memory)
        rejected = self._rejected(output.value) if hidden_states.dim() == 2 else torch.zeros_like(output.value)
        output.value = torch.where(rejected > 0, 0.9, 0.1)
        return output

    def _rejected(self, values: Tensor) -> Tensor:
        step, self.step = self.step, self.step + 1
        if self.rate == 0 or step < 0:
            return torch.zeros_like(values)
        span = round(1 / self.rate)
        if step % span == 0:
            self.places = torch.randint(span, values.shape, generator=self.generator, device=values.device)
        return (self.places == step % span).to(values.dtype)


def make_head(model: PreTrainedModel, rate: float, layer: int | str = "final") -> RejectingHead:
    config = ValueHeadConfig(hidden_size=feature_width(model), feature_layers=[layer], threshold=0.5)
    head = RejectingHead(config).to(model.device)
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
    new_tokens: int = 60
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
            model(self.input_ids[:, :-1], logits_to_keep=1, **{CACHE: self.cache})

    def inputs(self, kind: str) -> dict[str, Any]:
        """Arguments of `generate`, with a cache of its own."""
        cache: Cache = BlockCache(self.config) if kind == "block" else DynamicCache(config=self.config)
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            CACHE: cache,
        }


class Turns(StoppingCriteria):
    """Hands over after every token."""

    def __init__(self, hand_over: Callable[[], Any]):
        self.hand_over = hand_over

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        self.hand_over()
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def in_turns(*runs: Callable[[Turns], Any]) -> list[list[float]]:
    """Seconds of each turn of each run, all of them under way at once and taking turns, a token each.

    What slows the machine for a while slows all of them, so that their ratio is steadier than that of times taken one
    after the other. Each run passes the [`Turns`] that it is given to `generate`.
    """
    host, taken = getcurrent(), [list[float]() for _ in runs]
    players = [greenlet(run) for run in runs]
    while any(not player.dead for player in players):
        for index, player in enumerate(players):
            if not player.dead:
                start = time.perf_counter()
                player.switch(Turns(host.switch))
                taken[index].append(time.perf_counter() - start)
    return taken


def summary(ratios: Sequence[float]) -> dict[str, Any]:
    """The median of some ratios, and all of them."""
    return {"ratio_median": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}


def compare(model: PreTrainedModel, case: Case, pairs: int, prompt: Prompt | None = None) -> dict[str, Any]:
    """Times of `case` in pairs, reference and steered taking turns, after a short pair that does not count."""
    prompt = prompt or Prompt(model, case.batch, case.prompt)
    head = make_head(model, case.rate)
    config = ValueFilterConfig(
        value_head=head, num_candidates=case.count, evaluation=case.evaluation, lookahead=case.lookahead
    )
    arguments = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "eos_token_id": None}
    steer = {"custom_generate": value_steer_generate, "value_steer": config}
    rates = []

    def reference(inputs: dict[str, Any], new_tokens: int, turns: Turns) -> None:
        if case.against == "plain":
            model.generate(**inputs, **arguments, max_new_tokens=new_tokens, stopping_criteria=[turns])
            return
        cache, sizes = inputs[CACHE], (new_tokens, case.count)
        repeated_cache.generate(model, head, prompt.input_ids, cache, *sizes, turns.hand_over)

    def steered(inputs: dict[str, Any], new_tokens: int, turns: Turns) -> None:
        length = {"max_new_tokens": new_tokens, "stopping_criteria": [turns]}
        head.step = -1
        output = model.generate(**inputs, **arguments, **steer, **length)
        rates.append(output.interventions.float().mean().item())

    def pair(new_tokens: int) -> list[float]:
        caches = prompt.inputs("dynamic"), prompt.inputs(case.cache)
        turns = in_turns(partial(reference, caches[0], new_tokens), partial(steered, caches[1], new_tokens))
        return [sum(each) for each in turns]

    torch.manual_seed(0)
    pair(WARM_UP)
    times = [pair(case.new_tokens) for _ in range(pairs)]
    ratios = [mine / base for base, mine in times]
    tokens = case.new_tokens * case.batch
    return {
        **vars(case),
        **summary(ratios),
        "intervention_rate": round(statistics.mean(rates[1:]), 4),
        "reference_tokens_per_second": round(tokens / statistics.median(base for base, _ in times), 1),
        "tokens_per_second": round(tokens / statistics.median(mine for _, mine in times), 1),
    }
