"""The methods and heads that an engine serves, and those that one request gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.configuration.parse import ValueSteer, parse_configs
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.scorer import Scorer, bind
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.in_the_loop import names_judge
from hf_value_steer.vllm.overrides import MOST_CANDIDATES, apply_overrides


@dataclass(frozen=True)
class ServedMethods:
    """The methods of an engine and the head of each.

    Made by [`load`] from the JSON form, in the worker and where the arguments of the engine are made. Each request
    gets its configs and scorers from [`choose`].

    Args:
        methods (`dict`): from `"filter"`, `"abstain"` to its config.
        heads (`dict`): from the same names to the loaded head; methods that name one head share it.
    """

    methods: Mapping[str, SteeringConfig]
    heads: Mapping[str, ValueHead]

    @classmethod
    def load(cls, value_steer: ValueSteer) -> "ServedMethods":
        """Read the JSON form and load the heads, on the CPU.

        Raises:
            ValueError: for a config that vLLM cannot honour, a head that cannot be loaded, or one without a threshold.
            UnsupportedError: for a head that reads more than the final state of the token itself.
        """
        methods = {name: _servable(config) for name, config in parse_configs(value_steer).items()}
        names = [_head_name(config) for config in methods.values()]
        loaded = {name: _servable_head(name) for name in dict.fromkeys(names)}
        heads = dict(zip(methods, (loaded[name] for name in names), strict=True))
        served = cls({name: _settled(config, heads[name]) for name, config in methods.items()}, heads)
        served.scorers(served.methods)
        return served

    @property
    def filter(self) -> ValueFilterConfig | None:
        config = self.methods.get(ValueFilterConfig.method)
        return config if isinstance(config, ValueFilterConfig) else None

    @property
    def abstain(self) -> AbstentionConfig | None:
        config = self.methods.get(AbstentionConfig.method)
        return config if isinstance(config, AbstentionConfig) else None

    def scorers(self, methods: Mapping[str, SteeringConfig]) -> dict[str, Scorer]:
        """A scorer of one row for each method; raises a `ValueError` where a threshold is missing."""
        cpu = torch.device("cpu")
        return {name: bind(config, self.heads[name], 1, cpu) for name, config in methods.items()}

    def choose(self, extra_args: Mapping[str, Any] | None) -> tuple[dict[str, SteeringConfig], dict[str, Scorer]]:
        """Configs and scorers of one request; raises a `ValueError` for overrides that cannot be honoured."""
        methods = apply_overrides(self.methods, extra_args)
        return methods, self.scorers(methods)

    def describe(self) -> list[str]:
        """One line a method, for the log."""
        return [_line(config, head) for config, head in zip(self.methods.values(), self.heads.values(), strict=True)]


def _servable(config: MethodConfig) -> SteeringConfig:
    """`config` itself; raises a `ValueError` if vLLM does not serve its method."""
    if isinstance(config, ValueFilterConfig | AbstentionConfig):
        return config
    raise ValueError(
        f'The method "{config.method}" is for `generate`; vLLM serves "filter" and "abstain". Steering vectors can be '
        "baked into a checkpoint, which vLLM serves as it is."
    )


def _head_name(config: SteeringConfig) -> str:
    """The folder or Hub id of the head; raises a `ValueError` if vLLM cannot honour the config."""
    if isinstance(config.threshold, Sequence):
        raise ValueError("`threshold` of an engine is one number; requests choose others by `filter.threshold`.")
    if isinstance(config, ValueFilterConfig):
        if config.output_candidates or config.lookahead != "auto":
            raise ValueError("`output_candidates` and `lookahead` are for `generate`: leave them out under vLLM.")
    name = config.to_dict().get("value_head")
    if name is None:
        raise ValueError(f'`value_head` is missing from the "{config.method}" config: name a folder or a Hub id.')
    if names_judge(name):
        raise UnsupportedError(f"`value_head`={name!r} is a judge of text, which filters in `generate` only.")
    return str(name)


def _servable_head(name: str) -> ValueHead:
    """The head of this name; raises an `UnsupportedError` if it reads what vLLM does not show."""
    head: ValueHead = ValueHead.from_pretrained(name).eval()
    if not head.config.reads_final_alone:
        raise UnsupportedError(
            f"`value_head` {name!r} has `feature_layers`={head.config.feature_layers} and `temporal`="
            f"{head.config.temporal!r}, but vLLM shows the final state of each token, and no other: steer with "
            '`generate`, or serve a head with `feature_layers`=["final"] and `temporal`="none", such as that of '
            "model_cards/smollm2-135m-toxicity-final."
        )
    return head


def _settled(config: SteeringConfig, head: ValueHead) -> SteeringConfig:
    """`config` with what the head says where it does not; raises an error if vLLM cannot honour that."""
    settled = config.settled(head.config.operating_point)
    if isinstance(settled, ValueFilterConfig):
        if settled.selection != "first":
            raise UnsupportedError(
                '`selection="soft"` is for `generate`: under vLLM the first acceptable candidate is taken. Pass '
                '`selection="first"`.'
            )
        if settled.rollback:
            raise UnsupportedError(
                f"`rollback` is for `generate`: under vLLM no token is taken back. Pass `rollback=0` in the place of "
                f"{settled.rollback}."
            )
        if (settled.num_candidates or 0) > MOST_CANDIDATES:
            count = settled.num_candidates
            raise ValueError(f"`num_candidates` is at most {MOST_CANDIDATES} under vLLM, got {count}.")
    return settled


def _line(config: SteeringConfig, head: ValueHead) -> str:
    what = head.config.attribute or "unnamed attribute"
    threshold = config.threshold or head.config.threshold
    bound = f"alpha {config.alpha}" if config.alpha is not None else f"threshold {threshold}"
    extra = f", K={config.num_candidates}, {config.evaluation}" if isinstance(config, ValueFilterConfig) else ""
    return f"{config.method}: {what} ({head.config.polarity}), {bound}{extra}; head {head.name_or_path}"
