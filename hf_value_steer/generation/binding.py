"""Makes the methods of a call out of what it asks for. No other file knows all methods."""

from collections.abc import Callable, Mapping
from typing import Any

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.guide import GuidanceConfig
from hf_value_steer.configuration.methods import MethodConfig
from hf_value_steer.generation.abstention import Abstention
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.filter import ValueFilter
from hf_value_steer.generation.guidance import Guidance
from hf_value_steer.generation.method import Bindable, Method
from hf_value_steer.generation.vectors import Vectors


# Methods act in this order, whatever the order of the call. The values of the first one that has values are reported.
_BINDERS: Mapping[type[MethodConfig], Callable[[Any, Call], list[Method]]] = {
    ValueFilterConfig: ValueFilter.bind,
    AbstentionConfig: Abstention.bind,
    ActivationConfig: Vectors.bind,
    GuidanceConfig: Guidance.bind,
}


def bind_methods(call: Call) -> list[Method]:
    """The methods of a call, bound to it.

    Raises:
        ValueError: for what does not fit the model, the call or one another.
    """
    methods: list[Method] = []
    for kind, binder in _BINDERS.items():
        methods += [method for each in call.asked.values() if isinstance(each, kind) for method in binder(each, call)]
    others: list[Bindable] = [each for each in call.asked.values() if not isinstance(each, tuple(_BINDERS))]
    methods += [method for each in others for method in each.bind(call)]
    if not methods:
        raise ValueError("`value_steer` asks for a method that takes no part: its `bind` has returned none.")
    if sum(method.judges for method in methods) > 1:
        raise ValueError("`value_steer` takes one method that decides which tokens are kept.")
    return methods
