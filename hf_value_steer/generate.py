"""`generate(..., value_steer=...)`: one front door, on an instance, in a wrapper or from a Hub repository."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, StopStringCriteria

from hf_value_steer.backbone.parts import underlying
from hf_value_steer.configuration.parse import ValueSteer
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.decoding import configured, value_steer_generate
from hf_value_steer.generation.streaming import streaming


logger = logging.getLogger(__name__)
_BEFORE = "_before_value_steer"  # in the `__dict__` of an enabled model: what stood there under the names of `_DOORS`


def generate(
    model: PreTrainedModel,
    *args: Any,
    value_steer: ValueSteer | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(*args, **kwargs)`, steered if `value_steer` is given.

    Plain `generate` drops `streamer` and `tokenizer` (for stop strings, and judges of text) before a `custom_generate`
    callable; here both keep working.

    Args:
        model: the backbone.
        value_steer: a config, its dict form or a list of them. `None`: what a `value_steer` in the call's generation
            config or in the model's says; where there is none, the call is that of `transformers`. Beside an explicit
            `custom_generate` it is handed on to that strategy.
        streamer (`BaseStreamer`, *optional*): receives tokens after they were checked. It is ended, so that its reader
            goes on, when the call fails, too.
        kwargs: arguments of [`~transformers.GenerationMixin.generate`].

    Raises:
        ValueError: for arguments that cannot be honoured together with `value_steer`.
    """
    plain = type(model).generate
    given = {**_by_name(plain, model, args), **kwargs}
    configs = [given.get("generation_config"), model.generation_config]
    value_steer = configured(configs) if value_steer is None else value_steer
    if value_steer is None:
        own = _own(model, "generate")
        return own(*args, **kwargs) if streamer is None else own(*args, streamer=streamer, **kwargs)
    streamer = given.pop("streamer", streamer)
    if given.get("custom_generate") is not None:
        return plain(model, streamer=streamer, value_steer=value_steer, **given)
    with streaming(streamer) as released:
        _refuse_paged(given, configs)
        ours = {"value_steer": value_steer, "token_streamer": released, "text_tokenizer": given.get("tokenizer")}
        return plain(model, custom_generate=value_steer_generate, **ours, **_with_stop_strings(model, given))


def _by_name(plain: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of `generate`, by their names."""
    named = inspect.signature(plain).bind_partial(model, *args).arguments
    return dict(list(named.items())[1:])


def _refuse_paged(given: dict[str, Any], configs: list[GenerationConfig | None]) -> None:
    asked = [given.get("cache_implementation"), *(getattr(config, "cache_implementation", None) for config in configs)]
    if "paged" in asked:
        raise UnsupportedError(
            '`cache_implementation="paged"` is continuous batching, which cannot be steered here: leave it out, or '
            "serve the model with vLLM."
        )


def _with_stop_strings(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Turn `stop_strings` and `tokenizer` into the stopping criterion that `generate` would build of them."""
    given = dict(given)
    tokenizer, stop_strings, config = given.pop("tokenizer", None), None, given.get("generation_config")
    for source in (given, vars(config) if config is not None else {}, vars(model.generation_config)):
        stop_strings = stop_strings or source.get("stop_strings")
    if not stop_strings:
        return given
    if tokenizer is None:
        raise ValueError("`stop_strings` need the tokenizer: pass `tokenizer=` to `generate`.")
    criterion = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])
    given.pop("stop_strings", None)
    if config is not None and config.stop_strings:
        given["generation_config"] = copy.copy(config)
        given["generation_config"].stop_strings = None
    if model.generation_config.stop_strings:
        given["stop_strings"] = None  # an argument, because a config's `None` would be filled in from the model's
    return given


def enable_value_steer(model: nn.Module) -> Any:
    """Give this instance `generate(..., value_steer=...)`, in place; other instances stay as they are.

    ```python
    enable_value_steer(model)
    out = model.generate(**inputs, value_steer=cfg, do_sample=True)
    ```

    A `value_steer` in `model.generation_config`, or in the `generation_config` of a call, works like the argument.
    Copies and pickles of the model are enabled, too.

    An instance that has a `generate` of its own (a Hub repository or another library put it there) uses that one for
    calls without `value_steer`, as before; with it, that of `transformers`.

    Args:
        model: a model of `transformers`, or one inside PEFT or `torch.compile`.

    Returns:
        `model`.

    Raises:
        TypeError: if this is no model that can generate, or its class has a `generate` without further arguments.
    """
    inside = underlying(model)
    parameters = inspect.signature(type(inside).generate).parameters.values()
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        raise TypeError(
            f"`generate` of {type(inside).__name__} takes no further arguments, so it cannot be steered: it has a "
            "decoding of its own."
        )
    own = vars(inside)
    own.setdefault(_BEFORE, {name: own.get(name) for name in _DOORS})
    for name, door in _doors(inside):
        setattr(inside, name, partial(door, inside))
    return model


def disable_value_steer(model: nn.Module) -> Any:
    """Take `value_steer=` off again: the instance is as it was before `enable_value_steer`."""
    inside = underlying(model)
    for name, before in vars(inside).pop(_BEFORE, {}).items():
        if before is not None:
            setattr(inside, name, before)
        elif name in vars(inside):
            delattr(inside, name)
    return model


def _own(model: PreTrainedModel, name: str) -> Callable[..., Any]:
    """A method as it was before `enable_value_steer`."""
    before = vars(model).get(_BEFORE, {}).get(name)
    return before if before is not None else partial(getattr(type(model), name), model)


def _refuse_batching(name: str, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Continuous batching of an enabled model, which would pass over a `value_steer`."""
    configs = [*args, *kwargs.values(), model.generation_config]
    if "value_steer" in kwargs or configured(each for each in configs if isinstance(each, GenerationConfig)):
        raise UnsupportedError(
            f"`{name}` cannot be steered: leave `value_steer` out, or serve the model with vLLM, see `hf-value-steer "
            "serve`."
        )
    return _own(model, name)(*args, **kwargs)


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if configured([model.generation_config]) is not None:
        logger.warning(
            "generation_config.json will hold `value_steer`, which works after `enable_value_steer` only: without it "
            "the loaded model writes unsteered text. Save a ValueSteerForCausalLM instead."
        )
        model.generation_config._from_model_config = False  # else what it holds is not read again
    return _own(model, "save_pretrained")(*args, **kwargs)


_DOORS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "save_pretrained": _save_pretrained,
    **{
        name: partial(_refuse_batching, name)
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    },
}


def _doors(model: PreTrainedModel) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What an enabled model does in its own way, as far as its class has it."""
    return ((name, door) for name, door in _DOORS.items() if hasattr(type(model), name))
