"""What the checks of the doctor share: a model, a head or a stand-in for it, and ordinary ways to generate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_value_steer.backbone.features import ONLY_FINAL, Layer, collected
from hf_value_steer.backbone.parts import feature_width, underlying
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.operating_point import PLAIN
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.generation.decoding import value_steer_generate
from hf_value_steer.generation.scorer import Scorer, bind, layers_read, load_head
from hf_value_steer.heads.value_head import ValueHead


PROMPT, NEW_TOKENS = 16, 12


Status = Literal["ok", "FAIL", "n.a.", "info"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Args:
        name (`str`): what was checked.
        status (`str`): `"ok"`, `"FAIL"`, `"n.a."` if there was nothing to check, `"info"` if there is nothing to pass.
        detail (`str`): one sentence, with the remedy where there is one.
        numbers (`dict`): what was measured.
    """

    name: str
    status: Status
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


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
    def layers(self) -> tuple[Layer, ...]:
        """Those that the head reads."""
        return layers_read(self.head, self.model)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each entry of what the head reads, both `(width,)`, over random text."""
        return self._moments(self.layers)

    def _moments(self, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
        features = self.features(self.prompts(4), layers)[:, 1:].flatten(0, 1)  # the first position is like no other
        return features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)

    def prompts(self, rows: int, seed: int = 0) -> Tensor:
        """Random ordinary tokens, `(rows, PROMPT)`."""
        vocabulary = torch.arange(self.model.config.get_text_config(decoder=True).vocab_size)
        special = torch.tensor(_special_ids(self.model.generation_config), dtype=torch.long)
        ordinary = vocabulary[torch.isin(vocabulary, special, invert=True)]
        generator = torch.Generator().manual_seed(seed)
        return ordinary[torch.randint(len(ordinary), (rows, PROMPT), generator=generator)].to(self.model.device)

    def features(self, input_ids: Tensor, layers: Sequence[Layer]) -> Tensor:
        """States of a text at some layers, side by side, in one forward, float32, `(rows, length, width)`."""
        with collected(self.model, layers) as seen:
            self.model(input_ids=input_ids, use_cache=False)
        return seen[-1].of(layers).float()

    def scorer(self, rows: int) -> Scorer:
        """The head with an empty memory; its values are on the CPU."""
        return bind(self.reading(), self.head, rows, torch.device("cpu"), self.layers)

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
        return ValueFilterConfig(value_head=head, threshold=0.9, num_candidates=self.num_candidates, **PLAIN)

    def reading(self) -> ValueFilterConfig:
        """A config whose head gives its values and rejects nothing."""
        return ValueFilterConfig(
            value_head=self.head, threshold=0.5, max_interventions=0, num_candidates=self.num_candidates, **PLAIN
        )

    def _stand_in(self) -> ValueHead:
        mean, deviation = (moment.cpu() for moment in self._moments(ONLY_FINAL))
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
