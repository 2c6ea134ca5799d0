"""`GuidanceConfig`: stable value guidance as a method of `generate(..., value_steer=...)`."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from hf_value_steer.configuration.methods import MethodConfig


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(MethodConfig):
    r"""Stable value guidance (arXiv 2605.11712): later layers attend to bridge tokens that a value module makes.

    Args:
        module ([`GuidanceModule`] or `str`, *optional*): the module, or its Hub id or folder.
        refresh_interval (`int`): the bridge is made anew from the state of every so many-th token; 0 keeps that of the
            prompt's last token.
        momentum (`float`): in [0, 1), how much of the bridge before stays at a refresh.
        neutral_when_safe (`bool`): tokens that the module is content with do not see a bridge, and are those of the
            backbone. `False`, as in the paper: the bridge is always there.
        allow_backbone_mismatch (`bool`): use the module although its fingerprint names another backbone.
    """

    method: ClassVar[str] = "guide"

    module: PreTrainedModel | str | None = None
    refresh_interval: int = 1
    momentum: float = 0.8
    neutral_when_safe: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("refresh_interval", 0)
        if type(self.momentum) not in (int, float) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`momentum` has to be a number in [0, 1), got {self.momentum!r}.")
        if self.module is not None and not isinstance(self.module, PreTrainedModel | str):
            raise TypeError(f"`module` has to be a GuidanceModule, a Hub id or a folder, got {self.module!r}.")
