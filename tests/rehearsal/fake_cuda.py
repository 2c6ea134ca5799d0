"""Tensors that say that they are on `cuda:0` and are computed on the CPU.

As far as Python can see, a model that was moved by [`to_cuda`] runs as on a GPU: an operation on tensors of both
devices raises, `.numpy()` raises, and [`SYNCS`] counts what makes the host wait for the device, by the line that asks.
What is not rehearsed: compilation, CUDA graphs, the generator of a GPU (pass `seed=`), kernels of other packages.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map


CUDA = torch.device("cuda", 0)
SYNCS: Counter[tuple[str, str]] = Counter()  # by kind and place

_WAITING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select"}
_INDEXING = {"__getitem__", "__setitem__", "index", "index_put_"}  # indices may lie on the CPU: they are copied
_MOVING = {"to", "cuda", "cpu"}
_OF_THE_HOST = {"requires_grad": False, "grad": None, "is_leaf": True, "grad_fn": None}
_FLASH = "_scaled_dot_product_flash_attention"


class FakeCuda(torch.Tensor):
    """A tensor on the CPU, `inner`, in the guise of one on a GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FakeCuda":
        disguised = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA, requires_grad=False,
        )  # fmt: skip
        disguised.inner = inner
        return disguised

    def __repr__(self) -> str:
        return f"FakeCuda({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCuda":
        return FakeCuda(self.inner.clone())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operators that are called by name, as `torch.ops.aten.…`."""
        return _call(function, args, kwargs or {})


class OnCuda(TorchFunctionMode):
    """Inside, `device="cuda"` makes tensors of this kind, too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        disguised = any(isinstance(each, FakeCuda) for each in tree_flatten((args, kwargs))[0])
        moved = _name(function) in _MOVING and isinstance(args[0], Tensor)
        if disguised or moved or _is_cuda(kwargs.get("device")):
            return _call(function, args, kwargs)
        return function(*args, **kwargs)


def to_cuda(model: nn.Module) -> None:
    """Disguise the parameters and buffers of `model`."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: FakeCuda(tensor.detach()) for name, tensor in table.items() if tensor is not None})


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _place() -> str:
    """The innermost line of this library, else of transformers, that is running."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        path = frame.f_code.co_filename
        if "/hf_value_steer/" in path:
            return f"{path.split('/hf_value_steer/')[-1]}:{frame.f_code.co_name}"
        if found is None and "/transformers/" in path:
            found = f"transformers/{path.split('/transformers/')[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return found or "elsewhere"


def _wait(kind: str) -> None:
    SYNCS[kind.strip("_"), _place()] += 1


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, FakeCuda) else value


def _call(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    name = _name(function)
    with torch._C.DisableTorchFunction():
        if name == "__get__":
            return _attribute(function, args[0])
        if name == "numpy":
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_place()}")
        if name in _MOVING:
            return _moved(name, args, kwargs)
        flat = tree_flatten((args, kwargs))[0]
        disguised = [each for each in flat if isinstance(each, FakeCuda)]
        _refuse_mixed(name, args, flat, disguised)
        if disguised and name in _WAITING:
            _wait(name)
        if _FLASH in str(function) and "for_cpu" not in str(function) and disguised:
            return _flash(args, kwargs)
        on_cuda, kwargs = _is_on_cuda(name, args, kwargs, disguised)
        out = function(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        same = {id(each.inner): each for each in disguised}  # an operation in place returns what it was given

        def disguise(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, FakeCuda):
                return value
            return same[id(value)] if id(value) in same else FakeCuda(value)

        return tree_map(disguise, out) if on_cuda else out


def _is_on_cuda(
    name: str, args: Any, kwargs: dict[str, Any], disguised: list[FakeCuda]
) -> tuple[bool, dict[str, Any]]:
    """Whether the result is on the GPU, and the arguments without the device that does not exist."""
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    device = kwargs.get("device")
    if device is not None:
        if _is_cuda(device):
            kwargs["device"] = torch.device("cpu")
        return _is_cuda(device), kwargs
    if name.startswith("new_") or name.endswith("_like"):
        return isinstance(args[0], FakeCuda), kwargs
    return bool(disguised), kwargs


def _refuse_mixed(name: str, args: Any, flat: list[Any], disguised: list[FakeCuda]) -> None:
    """Raise for an operation on tensors of both devices; count the copies that indexing makes of them."""
    plain = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, FakeCuda) and each.dim() > 0]
    if disguised and plain:
        if name not in _INDEXING and name != "copy_":
            raise RuntimeError(f"{name} of tensors on cuda:0 and on the CPU, at {_place()}")
        _wait("host to device")
    if name in ("__getitem__", "__setitem__") and disguised:
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        by_mask = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in map(_bare, indices))
        if by_mask and (name == "__getitem__" or isinstance(args[2], Tensor)):
            _wait("boolean index")


def _moved(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, rest = args[0], list(args[1:])
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in rest:
        if isinstance(each, str | torch.device):
            device = each
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, Tensor):
            device, dtype = CUDA if isinstance(each, FakeCuda) else each.device, each.dtype
        elif isinstance(each, int) and not isinstance(each, bool):
            device = CUDA
    device = {"cuda": CUDA, "cpu": "cpu"}.get(name, device)
    was, goes = isinstance(tensor, FakeCuda), isinstance(tensor, FakeCuda) if device is None else _is_cuda(device)
    inner = _bare(tensor)
    out = inner if dtype is None else inner.to(dtype)
    if was != goes:
        _wait("host to device" if goes else "device to host")
        out = out.clone() if out is inner else out
    elif out is inner and not kwargs.get("copy"):
        return tensor
    elif out is inner:
        out = out.clone()
    return FakeCuda(out) if goes else out


def _flash(args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's FlashAttention-2, by its twin for CPUs, with what it demands of its arguments on a GPU."""
    query, key, value = (each.inner for each in args[:3])
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError(f"FlashAttention does not take {query.dtype} and heads of {query.shape[-1]}")
    if not query.shape[1] == key.shape[1] == value.shape[1] or query.shape[-1] != value.shape[-1]:
        raise RuntimeError(f"FlashAttention needs as many heads of keys as of queries, of one width, at {_place()}")
    twin = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log_denominator = twin(query, key, value, scale=kwargs.get("scale"))
    return FakeCuda(output), FakeCuda(log_denominator), *[None] * 7


def _attribute(function: Any, tensor: FakeCuda) -> Any:
    name = getattr(getattr(function, "__self__", None), "__name__", "")
    if name in ("device", "is_cuda", "is_cpu"):
        return {"device": CUDA, "is_cuda": True, "is_cpu": False}[name]
    if name in _OF_THE_HOST:
        return _OF_THE_HOST[name]
    if name == "data":
        return tensor
    out = function(tensor.inner)
    return FakeCuda(out) if isinstance(out, Tensor) else out
