"""What the configurations of the methods share: frozen dataclasses that describe the choices of one call."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_origin

from torch import nn
from transformers import PreTrainedModel

from hf_value_steer.checks import as_python, check_choice, check_probability, check_threshold
from hf_value_steer.files.references import PREFIX


def is_function(value: Any) -> bool:
    """Whether this is called like a function, and is no model and no class."""
    return callable(value) and not isinstance(value, type | nn.Module)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the runtime configurations share.

    Args:
        allow_backbone_mismatch (`bool`): use what was trained although its fingerprint names another backbone.
    """

    method: ClassVar[str]

    allow_backbone_mismatch: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_python(getattr(self, field.name)))
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and (value is not None or field.default is not None):
                check_choice(value, field.type, field.name)

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"`{name}` has to be an integer of at least {minimum}, got {value!r}.")

    def with_value_head(self, _value_head: PreTrainedModel) -> "MethodConfig":
        """This config with a value head where it needs one and names none."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the fields that differ from their defaults, and `method`.

        Raises:
            ValueError: if a field holds a model that was not loaded from anywhere, which JSON cannot name.
        """
        pairs = ((field, getattr(self, field.name)) for field in fields(self))
        chosen = {field.name: value for field, value in pairs if value is not field.default}
        for name, value in chosen.items():
            if isinstance(value, PreTrainedModel):
                if not value.name_or_path:
                    raise ValueError(f"`{name}` has no name: save it and pass its folder or Hub id instead.")
                chosen[name] = value.name_or_path
            elif callable(value) or (isinstance(value, str) and value.startswith(PREFIX)):
                raise ValueError(
                    f"`{name}`={value!r} is code, which a saved config cannot name: pass it to `generate`."
                )
        return {"method": self.method, **chosen}

    def to_json_string(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(MethodConfig):
    """What the configurations of methods with a value head share.

    Args:
        value_head ([`ValueHead`] or `str`, *optional*): the head, or its Hub id or folder.
        threshold (`float` or sequence of `float`, *optional*): threshold in (0, 1), or one for each row of the
            returned batch. The head's own by default.
        alpha (`float`, *optional*): instead of `threshold`: the rate, in (0, 1), that the head's calibration is to
            promise; it says of what ([`Calibration.guarantee`]). Choose `alpha` before you look at the thresholds,
            unless the calibration's mode is `"uniform"`.
        min_new_tokens (`int`): number of new tokens before the method starts to act.
        allow_backbone_mismatch (`bool`): use the head although its fingerprint names another backbone.
    """

    takes_judges: ClassVar[bool] = False  # whether a judge of text may stand in the place of the head

    value_head: PreTrainedModel | str | Callable[..., Any] | None = None
    threshold: float | Sequence[float] | None = None
    alpha: float | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        if self.alpha is not None:
            check_probability(self.alpha, "alpha")
            if self.threshold is not None:
                raise ValueError("`threshold` and `alpha` both say where to act: pass one of them.")
        self._check_integer("min_new_tokens", 0)
        judge = self.takes_judges and is_function(self.value_head)
        if self.value_head is not None and not isinstance(self.value_head, PreTrainedModel | str) and not judge:
            also = ", or a judge of text" if self.takes_judges else ""
            raise TypeError(
                f"`value_head` has to be a ValueHead, a Hub id or a folder{also}, got {self.value_head!r}."
            )

    def settled(self, _point: Mapping[str, Any] | None) -> "SteeringConfig":
        """This config with what it leaves open, and the operating point of the head says."""
        return self

    def with_value_head(self, value_head: PreTrainedModel) -> "SteeringConfig":
        """This config with `value_head` where it names none."""
        return self if self.value_head is not None else replace(self, value_head=value_head)
