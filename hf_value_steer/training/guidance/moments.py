"""Guidance of single moments of texts, for training: each is one step of `generate` whose past went unguided.

The texts are read once, without guidance and without a graph. Then the chosen tokens go through the model once more,
each with the cached keys and values of what stands before it and with a bridge of its own, by the code that `generate`
guides with. Only these few rows need a graph.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_value_steer.backbone.parts import decoder_layers
from hf_value_steer.backbone.points import feature_point, layer_point
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.guidance.steered import BridgeState, bridged
from hf_value_steer.hosts.transformers import CACHE


FLOOR = 0.05  # is added to the value of a moment, which says how likely it is chosen


@dataclass
class Guided:
    """What guided moments leave behind.

    Args:
        rows, steps (`torch.LongTensor` of shape `(moments,)`): which text, and which of its response tokens is next.
        base, logits (`torch.FloatTensor` of shape `(moments, vocab)`): without and with guidance.
        states (`torch.FloatTensor` of shape `(moments, width)`): what the bridges were made from, at l*.
        later (`torch.FloatTensor` of shape `(moments, value_width)`): value one layer above, where it shows first.
        bridges (`torch.FloatTensor` of shape `(moments, K, width)`).
    """

    rows: Tensor
    steps: Tensor
    base: Tensor
    logits: Tensor
    states: Tensor
    later: Tensor
    bridges: Tensor


class GuidedMoments:
    """Guides `count` moments of a batch of texts, more often those of a high value.

    Args:
        model, module: the backbone and what guides it.
        count (`int`): moments in one forward, at most.
        neutral (`bool`): only those with which the module is not content.
    """

    def __init__(self, model: PreTrainedModel, module: GuidanceModule, count: int, neutral: bool):
        self.model, self.module, self.count, self.neutral = model, module, count, neutral
        self.layers = decoder_layers(model)

    def __call__(self, inputs: dict[str, Tensor], prompt_length: int) -> Guided:
        """Guide a batch of [`join_states`], whose prompts are `prompt_length` tokens wide."""
        first, mask = prompt_length - 1, inputs["attention_mask"].bool()
        cache = DynamicCache()

        def choose(states: Tensor) -> None:
            self.prompt, self.prompt_mask = self.module.read_prompt(states[:, :prompt_length]), mask[:, :prompt_length]
            values = self.module.encode(states[:, first:-1], self.prompt, self.prompt_mask)
            self.rows, self.steps = self._choose(values, mask[:, prompt_length:])

        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(layer_point(self.model, self.module.config.layer).watched(choose))
            pick = feature_point(self.model).watched(lambda feature: feature[self.rows, first + self.steps][None])
            stack.enter_context(pick)
            base = self.model(**inputs, **{CACHE: cache}, use_cache=True).logits[0]
        return self._guide(inputs, cache, first + self.steps, base)

    def _choose(self, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        logits, corrections = self.module.correct(values)
        eligible = real & (corrections != 0).any(dim=-1) if self.neutral else real
        eligible = torch.where(eligible.any(), eligible, real)
        weights = ((logits.sigmoid() + FLOOR) * eligible).flatten()
        chosen = torch.multinomial(weights, min(self.count, int(eligible.sum()))).sort().values
        return chosen // real.shape[1], chosen % real.shape[1]

    def _guide(self, inputs: dict[str, Tensor], cache: DynamicCache, at: Tensor, base: Tensor) -> Guided:
        """Guide the tokens in the columns `at` of `self.rows`."""
        module, rows, layer = self.module, self.rows, self.module.config.layer
        past, seen = _until(cache, rows, at, inputs["attention_mask"])
        kept: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def guide(states: Tensor) -> Tensor | None:
                kept["states"] = states[:, 0].float()
                values = module.encode(states, self.prompt[rows], self.prompt_mask[rows])
                logits, corrections = module.correct(values)
                make = module.bridge if module.config.injection == "bridge" else module.injection
                bridge = kept["bridges"] = make(states, corrections)[:, 0]
                if module.config.injection == "inject":
                    return states + bridge.to(states)
                everyone = seen.new_ones(len(rows))
                state = BridgeState(bridge, everyone, logits[:, 0])
                stack.enter_context(bridged(self.layers, layer + 1, past, state, True))
                return None

            def value_later(states: Tensor) -> None:
                kept["later"] = module.encode(states[:, -1:], self.prompt[rows], self.prompt_mask[rows])[:, 0]

            stack.enter_context(layer_point(self.model, layer + 1).watched(value_later))
            stack.enter_context(layer_point(self.model, layer).watched(guide))
            logits = self.model(
                input_ids=inputs["input_ids"][rows, at][:, None],
                attention_mask=torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1).long(),
                position_ids=inputs["position_ids"][rows, at][:, None],
                use_cache=True,
                **{CACHE: past},
            ).logits[:, 0]
        return Guided(rows, self.steps, base, logits, **kept)


def _until(cache: DynamicCache, rows: Tensor, at: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Keys and values before the columns `at` of `rows`, aligned on the right, and which of them are no padding."""
    longest = int(at.max())
    source = at[:, None] - longest + torch.arange(longest, device=at.device)
    seen = (source >= 0) & mask.bool()[rows[:, None], source.clamp(min=0)]
    past = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            each[rows[:, None], :, source.clamp(min=0)].transpose(1, 2) for each in (layer.keys, layer.values)
        )
        past.update(keys, values, index)
    return past, seen
