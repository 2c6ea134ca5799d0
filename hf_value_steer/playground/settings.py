"""What the controls of the page say, as configurations and arguments of `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.arguments.steer import PlayArguments
from hf_value_steer.choices import HeadMethod
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.heads.value_head import ValueHead


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One position of all controls.

    Args:
        chat (`bool`): answer the prompt as a message, instead of continuing it.
        method (`str`): `"filter"` or `"abstain"`.
        promised (`bool`): whether `alpha` counts, in the place of `threshold`.
        threshold (`float`): in (0, 1).
        alpha (`float`): what the head's calibration is to promise, in (0, 1).
        num_candidates (`int`): K of the filter.
        rollback (`int`): how many tokens the filter may take back at a dead end.
        multiplier (`float`): of the vectors; 0 is without them.
        layers (sequence of `float`): factors on the multiplier, one for each layer that has a vector; all 1 if empty.
        temperature (`float`): of the sampling; 0 is greedy decoding.
        top_p (`float`): of the sampling.
        max_new_tokens (`int`): length of a text.
        seed (`int`): both texts are drawn from it.
    """

    chat: bool = False
    method: HeadMethod = "filter"
    promised: bool = False
    threshold: float = 0.5
    alpha: float = 0.1
    num_candidates: int = 8
    rollback: int = 0
    multiplier: float = 0.0
    layers: Sequence[float] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0

    @classmethod
    def at_first(cls, arguments: PlayArguments, head: ValueHead) -> "Settings":
        """Where the controls stand when the page is opened: at what the user has said, or what the head says."""
        said = {name: getattr(arguments, name) for name in ("num_candidates", "rollback")}
        said = {name: number for name, number in said.items() if number is not None}
        point = ValueFilterConfig(**said).settled(head.config.operating_point)
        return cls(
            chat=head.config.trained_on_chats,
            method=arguments.method or cls.method,
            promised=arguments.alpha is not None,
            threshold=arguments.threshold or head.config.threshold or cls.threshold,
            alpha=arguments.alpha or cls.alpha,
            num_candidates=point.num_candidates,
            rollback=point.rollback,
        )

    def valued(self, head: ValueHead) -> SteeringConfig:
        """The configuration of the head.

        Raises:
            ValueError: for numbers that are out of range.
        """
        when: dict[str, Any] = {"alpha": self.alpha} if self.promised else {"threshold": self.threshold}
        if self.method == "abstain":
            return AbstentionConfig(value_head=head, **when)
        return ValueFilterConfig(value_head=head, num_candidates=self.num_candidates, rollback=self.rollback, **when)

    def added(self, vectors: SteeringVectors | None) -> list[MethodConfig]:
        """The configuration of the vectors, if there are any."""
        if vectors is None or not self.multiplier:
            return []
        if self.layers:
            vectors = replace(vectors, strengths=vectors.strengths * torch.tensor(self.layers))
        return [ActivationConfig(vectors=vectors, multiplier=self.multiplier)]

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        length = {"max_new_tokens": self.max_new_tokens}
        if not self.temperature:
            return {"do_sample": False, **length}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0, **length}
