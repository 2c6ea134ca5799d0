"""What the checks of the doctor share: a model, a head or a stand-in for it, and ordinary ways to generate."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_value_steer.backbone.parts import feature_width, underlying
from hf_value_steer.backbone.points import feature_point
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.generation.decoding import value_steer_generate
from hf_value_steer.generation.scorer import load_head
from hf_value_steer.heads.value_head import ValueHead


PROMPT, NEW_TOKENS = 16, 12


class Context:
    """What the checks share.

    Args:
        model: the backbone, in evaluation mode.
        given ([`ValueHead`] or `str`, *optional*): the head to examine, or its folder or Hub id.
        num_candidates (`int`): K.
    """

    def __init__(self, model: PreTrainedModel, given: ValueHead | str | None, num_candidates: int):
        self.model, self.given, self.num_candidates = underlying(model), given, num_candidates
        self.tolerance = max(1e-4, 8 * torch.finfo(model.dtype).eps)

    @cached_property
    def loaded(self) -> ValueHead:
        """The given head. Raises what `generate` would raise if it does not fit."""
        return load_head(ValueFilterConfig(value_head=self.given), self.model)

    @cached_property
    def head(self) -> ValueHead:
        """The given head, or a stand-in if there is none that fits."""
        try:
            return self.loaded
        except (OSError, TypeError, ValueError):
            return self._stand_in()

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each entry of the feature, both `(width,)`, over random text."""
        features = self.features(self.prompts(4))[:, 1:].flatten(0, 1)  # the first position is like no other
        return features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)

    def prompts(self, rows: int, seed: int = 0) -> Tensor:
        """Random ordinary tokens, `(rows, PROMPT)`."""
        vocabulary = torch.arange(self.model.config.get_text_config(decoder=True).vocab_size)
        special = torch.tensor(_special_ids(self.model.generation_config), dtype=torch.long)
        ordinary = vocabulary[torch.isin(vocabulary, special, invert=True)]
        generator = torch.Generator().manual_seed(seed)
        return ordinary[torch.randint(len(ordinary), (rows, PROMPT), generator=generator)].to(self.model.device)

    def features(self, input_ids: Tensor) -> Tensor:
        """Features of a text in one forward, float32, `(rows, length, width)`."""
        seen: list[Tensor] = []
        with feature_point(self.model).watched(seen.append):
            self.model(input_ids=input_ids, use_cache=False)
        return seen[-1].float()

    def values(self, features: Tensor) -> Tensor:
        """The head's values of features `(..., width)`."""
        return self.head.to(features.device)(features).value  # type: ignore[no-any-return]

    def generate(self, input_ids: Tensor, new_tokens: int = NEW_TOKENS, **arguments: Any) -> Any:
        """Plain greedy `generate` of exactly `new_tokens` tokens, unless `arguments` say otherwise."""
        arguments = {"attention_mask": torch.ones_like(input_ids), "return_dict_in_generate": True, **arguments}
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "eos_token_id": None}
        return self.model.generate(input_ids, **greedy, **arguments)

    def steer(self, input_ids: Tensor, config: ValueFilterConfig, **arguments: Any) -> Any:
        """`generate`, steered."""
        return self.generate(input_ids, custom_generate=value_steer_generate, value_steer=config, **arguments)

    def accepting(self) -> ValueFilterConfig:
        """A config with a head that answers 0.5 to everything, below its threshold."""
        head = _linear_head(torch.zeros(feature_width(self.model)), torch.zeros(()))
        return ValueFilterConfig(value_head=head, threshold=0.9, num_candidates=self.num_candidates)

    def reading(self) -> ValueFilterConfig:
        """A config whose head gives its values and rejects nothing."""
        return ValueFilterConfig(
            value_head=self.head, threshold=0.5, max_interventions=0, num_candidates=self.num_candidates
        )

    def _stand_in(self) -> ValueHead:
        mean, deviation = (moment.cpu() for moment in self.moments)
        direction = torch.randn(len(mean), generator=torch.Generator().manual_seed(0))
        weight = 2.0 * direction / direction.norm() / deviation
        return _linear_head(weight, -weight @ mean)


def _linear_head(weight: Tensor, bias: Tensor) -> ValueHead:
    with torch.random.fork_rng(devices=[]):
        head = ValueHead(ValueHeadConfig(hidden_size=len(weight), architecture="linear"))
    head.net.load_state_dict({"0.weight": weight[None], "0.bias": bias[None]})
    return head


def _special_ids(config: GenerationConfig) -> list[int]:
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    nested: Iterable[list[int]] = ([entry] if isinstance(entry, int) else entry or [] for entry in ids)
    return [token for entry in nested for token in entry]
