"""How the `value_steer` argument is read."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

from hf_value_steer.checks import refuse_unknown
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.guide import GuidanceConfig
from hf_value_steer.configuration.methods import MethodConfig
from hf_value_steer.files.references import PREFIX


# What `generate` takes. Among the rest are methods of one's own, see [`~hf_value_steer.generation.method.Bindable`].
ValueSteer: TypeAlias = MethodConfig | Mapping[str, Any] | Sequence[MethodConfig | Mapping[str, Any] | Any] | Any

METHODS: dict[str, type[MethodConfig]] = {
    "filter": ValueFilterConfig,
    "abstain": AbstentionConfig,
    "guide": GuidanceConfig,
    "activate": ActivationConfig,
}


def parse_configs(value_steer: ValueSteer) -> dict[str, MethodConfig]:
    """Read a `value_steer` that is saved or served: configs or their JSON form, see [`parse_value_steer`].

    Raises:
        TypeError: for a method of one's own, which only `generate` takes.
    """
    asked = parse_value_steer(value_steer)
    for name, each in asked.items():
        if not isinstance(each, MethodConfig):
            raise TypeError(
                f'The method "{name}" is an object, which is for `generate`: pass a config or its dict form.'
            )
    return asked


def parse_value_steer(value_steer: ValueSteer) -> dict[str, Any]:
    """Read the `value_steer` argument: a config, its JSON form, a method of one's own, or a list of them.

    Returns:
        `dict` from method name (`"filter"`, `"abstain"`, `"activate"`, `"guide"`) to its config, or to the method.
    """
    items: Sequence[Any] = value_steer if isinstance(value_steer, list | tuple) else [value_steer]
    configs = [_parse_one(item) for item in items]
    methods = [config.method for config in configs]
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"`value_steer` takes one config a method, at least one; got methods {methods}.")
    return dict(zip(methods, configs, strict=True))


def _parse_one(item: Any) -> Any:
    own = callable(getattr(item, "bind", None)) and isinstance(getattr(item, "method", None), str)
    if own or isinstance(item, MethodConfig):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(
            f"`value_steer` takes a config, its dict form or a list of them, got {type(item).__name__}. A head goes "
            "into a config: `value_steer=ValueFilterConfig(value_head=head)`."
        )
    options = dict(item)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f'`value_steer` needs a "method", one of {", ".join(METHODS)}; got {method!r}.')
    cls = METHODS[method]
    refuse_unknown(options, (field.name for field in fields(cls)), cls.__name__)
    if str(options.get("value_head", "")).startswith(PREFIX):
        raise ValueError(
            f"`value_head`={options['value_head']!r} names code, which no dict form may: it may come from a file, "
            f"or from others. Pass a {cls.__name__}."
        )
    return cls(**options)
