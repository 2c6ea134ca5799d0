"""`generate(..., value_steer=...)`: one front door, on an instance, in a wrapper or from a Hub repository."""

import types
from typing import Any

from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, StopStringCriteria

from hf_value_steer.configuration import ValueSteer
from hf_value_steer.generation.decoding import value_steer_generate


_BEFORE = "_generate_before_value_steer"  # in the `__dict__` of an enabled model: its own `generate`, if it had one


def generate(
    model: PreTrainedModel,
    *args: Any,
    value_steer: ValueSteer | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(*args, **kwargs)`, steered if `value_steer` is given.

    Plain `generate` drops `streamer` and `tokenizer` (for stop strings) before a `custom_generate` callable; here both
    keep working.

    Args:
        model: the backbone.
        value_steer: a config, its dict form or a list of them; `None` generates as if we were not there. Beside an
            explicit `custom_generate` it is handed on to that strategy.
        streamer (`BaseStreamer`, *optional*): receives tokens after they were checked.
        kwargs: arguments of [`~transformers.GenerationMixin.generate`].

    Raises:
        ValueError: for arguments that cannot be honoured together with `value_steer`.
    """
    plain = type(model).generate
    if value_steer is None:
        own = vars(model).get(_BEFORE) or types.MethodType(plain, model)
        return own(*args, **kwargs) if streamer is None else own(*args, streamer=streamer, **kwargs)
    if kwargs.get("custom_generate") is not None:
        return plain(model, *args, streamer=streamer, value_steer=value_steer, **kwargs)
    kwargs = _with_stop_strings(model, kwargs)
    return plain(
        model, *args, custom_generate=value_steer_generate, value_steer=value_steer, token_streamer=streamer, **kwargs
    )


def _with_stop_strings(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn `stop_strings` and `tokenizer` into the stopping criterion that `generate` would build of them."""
    kwargs = dict(kwargs)
    tokenizer, stop_strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    for config in (kwargs.get("generation_config"), model.generation_config):
        stop_strings = stop_strings or (config.stop_strings if config is not None else None)
    if not stop_strings:
        return kwargs
    if tokenizer is None:
        raise ValueError("`stop_strings` need the tokenizer: pass `tokenizer=` to `generate`.")
    criterion = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
    return kwargs


def enable_value_steer(model: PreTrainedModel) -> PreTrainedModel:
    """Give this instance `generate(..., value_steer=...)`, in place; other instances stay as they are.

    ```python
    enable_value_steer(model)
    out = model.generate(**inputs, value_steer=cfg, do_sample=True)
    ```

    An instance that has a `generate` of its own (a Hub repository or another library put it there) uses that one for
    calls without `value_steer`, as before; with it, that of `transformers`.
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"`model` has to be a transformers model that can generate, got {type(model).__name__}.")
    vars(model).setdefault(_BEFORE, vars(model).get("generate"))
    model.generate = types.MethodType(generate, model)
    return model


def disable_value_steer(model: PreTrainedModel) -> PreTrainedModel:
    """Take `value_steer=` off again: the instance is as it was before `enable_value_steer`."""
    if _BEFORE in vars(model):
        before = vars(model).pop(_BEFORE)
        if before is None:
            del model.generate
        else:
            model.generate = before
    return model
