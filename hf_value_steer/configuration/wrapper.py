"""`ValueSteerConfig`: where a wrapped model has its backbone, and how its text is steered."""

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_value_steer.files.schema import SCHEMA, VersionedConfig, check_schema


_NOT_DELEGATED = ("auto_map", "quantization_config")  # they say how a checkpoint is to be loaded: the backbone's


@strict
class ValueSteerConfig(VersionedConfig):
    """Where the backbone is, and how its text is steered.

    The config of a [`ValueSteerForCausalLM`] answers for its backbone, too: `vocab_size`, `hidden_size`,
    `eos_token_id` and what else is not said here are those of the backbone's config. They are not saved with it.

    Args:
        backbone (`str`, *optional*): Hub id or folder of the backbone; `None` if it lies in the same repository.
        backbone_revision (`str`, *optional*), backbone_subfolder (`str`, *optional*): where it is in its repository.
        value_steer (`list` of `dict`): the JSON form of the runtime configurations, without their head.
        schema_version (`int`): what the fields of this config mean, see [`hf_value_steer.files.schema`].
    """

    model_type: ClassVar[str] = "hvs_value_steer"
    old_model_type: ClassVar[str] = "value_steer"

    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_subfolder: str | None = None
    value_steer: list[dict[str, Any]] | None = None
    schema_version: int = SCHEMA

    def validate_value_steer(self) -> None:
        """Part of `@strict` validation."""
        check_schema(self.schema_version)

    def speak_for(self, backbone_config: PreTrainedConfig) -> None:
        """Answer with the backbone's config what this one does not say."""
        self._backbone_config = backbone_config

    def __getattr__(self, name: str) -> Any:
        backbone_config = vars(self).get("_backbone_config")
        if backbone_config is None or name.startswith("_") or name in _NOT_DELEGATED:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(backbone_config, name)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's."""
        config = vars(self).get("_backbone_config")
        return super().get_text_config(*args, **kwargs) if config is None else config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the backbone's config."""
        own = copy.copy(self)
        own.__dict__.pop("_backbone_config", None)
        return super(ValueSteerConfig, own).to_dict()  # type: ignore[no-any-return]
