"""Guidance of whole texts in one forward, for training: the bridges of all steps stand behind the text.

The same as token by token in `generate`: a token sees the bridge that held when it was read, and a bridge what the
token sees that it was made from, at that token's position.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_value_steer.backbone import decoder_layers
from hf_value_steer.svgt.module import ValueGuidanceModule
from hf_value_steer.svgt.steered import named_arguments, watched


@dataclass
class Guided:
    """What a guided forward leaves behind.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, vocab)`): of every response token.
        states (`torch.FloatTensor` of shape `(rows, tokens, width)`): what the bridges were made from, at l*.
        later (`torch.FloatTensor` of the same shape): the output of the layer above, where guidance shows first.
        bridges (`torch.FloatTensor` of shape `(rows, refreshes, K, width)`).
        shown (`torch.BoolTensor` of shape `(rows, tokens)`): whether a token was guided.
        prompt (`torch.FloatTensor` of shape `(rows, length, value_width)`): what the module remembers of prompts.
    """

    logits: Tensor
    states: Tensor
    later: Tensor
    bridges: Tensor
    shown: Tensor
    prompt: Tensor


class GuidedText:
    """One forward of prompts and responses with guidance; the last arguments as in [`BridgeGuidanceConfig`]."""

    def __init__(
        self, model: PreTrainedModel, module: ValueGuidanceModule, interval: int, momentum: float, neutral: bool
    ):
        self.model, self.module, self.interval = model, module, interval
        self.momentum, self.neutral = momentum, neutral
        self.layers = decoder_layers(model)

    def __call__(self, inputs: dict[str, Tensor], prompt_length: int) -> Guided:
        """Forward a batch of [`~hf_value_steer.svgt.states.join`], whose prompts are `prompt_length` tokens wide."""
        self.first, self.prompt_mask = prompt_length - 1, inputs["attention_mask"][:, :prompt_length].bool()
        self.length = inputs["input_ids"].shape[1]
        later: list[Tensor] = []
        at = self.module.config.layer
        bridging = self.module.config.injection == "bridge"
        with ExitStack() as stack:
            stack.enter_context(watched(self.layers[at], self._guide))
            stack.enter_context(
                watched(self.layers[at + 1], lambda states: later.append(states[:, self.first : self.length - 1]))
            )
            for layer in self.layers[at + 1 :] if bridging else ():
                handle = layer.register_forward_pre_hook(self._widen, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(watched(self.layers[-1], lambda states: states[:, : self.length]))
            responses = self.length - prompt_length
            logits = self.model(**inputs, use_cache=False, logits_to_keep=responses + 1).logits[:, :-1]
        return Guided(logits, self.states, later[0], self.bridges, self.shown, self.prompt)

    def _guide(self, states: Tensor) -> Tensor:
        module, steps = self.module, slice(self.first, self.length - 1)
        with torch.no_grad():
            self.states = states[:, steps].float()
            self.prompt = module.read_prompt(states[:, : self.first + 1])
            refreshed = self.states[:, :: self.interval] if self.interval else self.states[:, :1]
            _, corrections = module.correct(module.encode(refreshed, self.prompt, self.prompt_mask))
            discontent = (corrections != 0).any(dim=-1)
        make = module.bridge if module.config.injection == "bridge" else module.injection
        fresh = make(refreshed, corrections)
        bridges = [fresh[:, 0]]
        for step in range(1, fresh.shape[1]):
            bridges.append(torch.lerp(fresh[:, step], bridges[-1], self.momentum))
        self.bridges = torch.stack(bridges, dim=1)
        count = self.states.shape[1]
        self.held = torch.arange(count) // (self.interval or count)
        self.shown = (discontent if self.neutral else torch.ones_like(discontent))[:, self.held]
        if module.config.injection == "inject":
            added = self.bridges[:, self.held, 0] * self.shown[..., None]
            return torch.cat([states[:, : self.first], states[:, steps] + added.to(states), states[:, -1:]], dim=1)
        return torch.cat([states, self.bridges.flatten(1, 2).to(states)], dim=1)

    def _widen(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        given = named_arguments(layer, args, kwargs)
        count, refreshes = self.bridges.shape[2], self.bridges.shape[1]
        makers = (self.first + torch.arange(refreshes) * self.interval).repeat_interleave(count)
        mask = given["attention_mask"]
        if mask is None:
            mask = torch.ones(1, 1, self.length, self.length, dtype=torch.bool).tril()
        rows = len(self.shown)
        text = mask.bool() if mask.dtype == torch.bool else mask == 0
        text = text.expand(rows, -1, -1, -1)
        seen = torch.zeros(rows, 1, self.length, refreshes, dtype=torch.bool)
        own = nn.functional.one_hot(self.held, refreshes).bool()
        seen[:, 0, self.first : self.length - 1] = own & self.shown[..., None]
        block = torch.eye(refreshes, dtype=torch.bool).repeat_interleave(count, 0).repeat_interleave(count, 1)
        top = torch.cat([text, seen.repeat_interleave(count, -1)], dim=-1)
        bottom = torch.cat([text[:, :, makers], block.expand(rows, 1, -1, -1)], dim=-1)
        wide = torch.cat([top, bottom], dim=2)
        if mask.dtype != torch.bool:
            wide = torch.zeros(wide.shape, dtype=mask.dtype).masked_fill(~wide, torch.finfo(mask.dtype).min)
        given["attention_mask"] = wide
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = tuple(
                torch.cat([table, table[:, makers]], dim=1) for table in given["position_embeddings"]
            )
        return (), given
