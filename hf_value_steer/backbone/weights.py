"""Answers about the weights of a model, found once and again only when its weights have changed."""

import functools
from collections.abc import Callable, Iterator
from ctypes import c_uint64
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


SAMPLES_PER_PARAMETER = 16
PLAIN = (Tensor, nn.Parameter)  # whose entries lie in memory as they are
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def sample(parameter: Tensor) -> Tensor:
    """Up to 16 entries of a parameter, at regular distances; up to 16 of each tensor that it is made of."""
    stride = max(parameter.numel() // SAMPLES_PER_PARAMETER, 1)
    if type(parameter) in PLAIN and parameter.is_contiguous():  # much faster than what it is the same as
        count = min(-(-parameter.numel() // stride), SAMPLES_PER_PARAMETER)
        return parameter.detach().as_strided((count,), (stride,))
    try:
        return parameter.detach().flatten()[::stride][:SAMPLES_PER_PARAMETER]
    except NotImplementedError:  # a quantised weight of torchao: its entries lie in tensors of other shapes
        names, _ = parameter.__tensor_flatten__()  # type: ignore[attr-defined]
        return torch.cat([sample(getattr(parameter, name)).float() for name in names])


def until_weights_change(answer: Callable[[M], T]) -> Callable[[M], T]:
    """Ask once for each model, its shadows included, and again when a parameter or an adapter's state is another.

    Most writers raise a parameter's version. Some (PEFT when it merges) write through `.data`, which does not: they
    are seen in the entries in the middle of every parameter.
    """
    known = WeakIdKeyDictionary()  # by the first parameter, which a model and its shadows share

    @functools.wraps(answer)
    def remembered(model: M) -> T:
        first, state = next(model.parameters(), None), _state(model)
        found = known.get(first) if first is not None else None  # type: ignore[no-untyped-call]
        if found is None or found[0] != state:
            found = (state, answer(model))
            if first is not None:
                known[first] = found
        return found[1]

    return remembered


@torch.no_grad()
def _state(model: nn.Module) -> Any:
    """What is another thing once the weights of `model` are, as far as this can be told without reading them all."""
    marks: list[Any] = [type(model).__name__]
    samples = dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for module in _modules(model):
        if "_disable_adapters" in module.__dict__:
            names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
            marks.append([repr(module.__dict__.get(name)) for name in names])
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            marks.append(id(parameter))
            marks.append(0 if parameter.is_inference() else parameter._version)
            if type(parameter) not in PLAIN or parameter.is_meta:
                continue
            marks.append(address := parameter.data_ptr())
            if address and parameter.is_cpu and parameter.is_contiguous() and parameter.nbytes >= 8:
                middle = address + parameter.nbytes // 16 * 8
                marks.append(c_uint64.from_address(middle).value)  # an operation each would take much longer
            else:
                samples.setdefault((parameter.device, parameter.dtype), []).append(sample(parameter))
    read = {kind: torch.cat(each).cpu().view(torch.uint8).numpy().tobytes() for kind, each in samples.items()}
    return marks, read


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module, faster than `modules()`; one that is there twice comes twice."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            yield module
            waiting.extend(module._modules.values())
