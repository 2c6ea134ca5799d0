"""`ValueSteerForCausalLM`: a backbone and its value head as one model, with the methods of a `PreTrainedModel`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_value_steer.configuration import ValueSteer, parse_value_steer
from hf_value_steer.generate import generate
from hf_value_steer.generation.scorer import check_fit
from hf_value_steer.hub import push
from hf_value_steer.modeling import ValueHead
from hf_value_steer.points import feature_point
from hf_value_steer.schema import SCHEMA, VersionedConfig, check_schema, register


_HEAD_FOLDER, _BACKBONE_FOLDER = "value_head", "backbone"


@strict
class ValueSteerConfig(VersionedConfig):
    """Where the backbone is, and how its text is steered.

    Args:
        backbone (`str`, *optional*): Hub id or folder of the backbone; `None` if it lies in the same repository.
        backbone_revision (`str`, *optional*): its revision.
        value_steer (`list` of `dict`): the JSON form of the runtime configurations, without their head.
        schema_version (`int`): what the fields of this config mean, see [`hf_value_steer.schema`].
    """

    model_type: ClassVar[str] = "hvs_value_steer"
    old_model_type: ClassVar[str] = "value_steer"

    backbone: str | None = None
    backbone_revision: str | None = None
    value_steer: list[dict[str, Any]] | None = None
    schema_version: int = SCHEMA

    def validate_value_steer(self) -> None:
        """Part of `@strict` validation."""
        check_schema(self.schema_version)


@dataclass
class ValueSteerCausalLMOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """[`~transformers.modeling_outputs.CausalLMOutputWithPast`] and `token_values`.

    Args:
        token_values (`torch.FloatTensor` of shape `(batch, positions)`): value of each position that has logits.
    """

    token_values: Tensor | None = None


class ValueSteerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    r"""A frozen backbone and a value head: `generate` is steered, `forward` also returns `token_values`.

    ```python
    model = ValueSteerForCausalLM.from_pretrained("org/backbone", value_head="org/head")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ```

    Args:
        backbone: a causal language model.
        value_head: a head that fits it.
        value_steer: how `generate` steers by default, without heads; the filter with its defaults if left out.
    """

    config_class = ValueSteerConfig
    base_model_prefix = "backbone"

    def __init__(self, backbone: PreTrainedModel, value_head: ValueHead, value_steer: ValueSteer | None = None):
        methods = parse_value_steer(value_steer or {"method": "filter"}).values()
        check_fit(value_head, backbone, any(method.allow_backbone_mismatch for method in methods))
        super().__init__(
            ValueSteerConfig(
                backbone=backbone.name_or_path or None, value_steer=[method.to_dict() for method in methods]
            )
        )
        self.backbone, self.value_head = backbone, value_head
        self.generation_config = backbone.generation_config

    @property
    def device(self) -> Any:
        return self.backbone.device

    @property
    def dtype(self) -> Any:
        return self.backbone.dtype

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> ValueSteerCausalLMOutput:
        """The backbone's forward, and the values of the positions that it computed logits for."""
        values: list[Tensor] = []
        with feature_point(self.backbone).watched(lambda feature: values.append(self.value_head(feature).value)):
            outputs = self.backbone(*args, **{**kwargs, "return_dict": True})
        return ValueSteerCausalLMOutput(**outputs, token_values=values[-1])

    def generate(self, *args: Any, value_steer: ValueSteer | None = None, **kwargs: Any) -> Any:
        """The backbone's `generate`, steered; configs without a head use this model's.

        Args:
            value_steer: overrides the default of this model. For unsteered text use `model.backbone.generate`.
        """
        methods = parse_value_steer(value_steer or self.config.value_steer).values()
        steer = [method.with_value_head(self.value_head) for method in methods]
        return generate(self.backbone, *args, value_steer=steer, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        value_head: ValueHead | str | None = None,
        value_steer: ValueSteer | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> "ValueSteerForCausalLM":
        """Load what `save_pretrained` wrote, or put a plain backbone and a head together.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a backbone, or of a saved `ValueSteerForCausalLM`.
            value_head ([`ValueHead`] or `str`, *optional*): the head, its Hub id or folder; required for a plain
                backbone.
            value_steer (*optional*): how `generate` steers by default.
            revision (`str`, *optional*), token (*optional*): as in `transformers`.
            config (*optional*): the config, if it is already there.
            kwargs: arguments of the backbone's `from_pretrained` (`dtype`, `device_map`, ...).
        """
        hub = {"revision": revision, "token": token}
        location = str(pretrained_model_name_or_path)
        config = config or AutoConfig.from_pretrained(location, **hub)
        if not isinstance(config, ValueSteerConfig):
            if value_head is None:
                raise ValueError(f"{location} is a plain backbone: pass `value_head=`, a ValueHead or its Hub id.")
            backbone = AutoModelForCausalLM.from_pretrained(location, **hub, **kwargs)
            head = ValueHead.from_pretrained(value_head, token=token) if isinstance(value_head, str) else value_head
            return cls(backbone, head, value_steer)
        head = ValueHead.from_pretrained(location, subfolder=_HEAD_FOLDER, **hub)
        if config.backbone is None:
            backbone = AutoModelForCausalLM.from_pretrained(location, subfolder=_BACKBONE_FOLDER, **hub, **kwargs)
        else:
            reference = {"revision": config.backbone_revision, "token": token}
            backbone = AutoModelForCausalLM.from_pretrained(config.backbone, **reference, **kwargs)
        return cls(backbone, head, value_steer or config.value_steer)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], save_backbone: bool = False, **kwargs: Any
    ) -> None:
        """Write the config, the head (`value_head/`), and the backbone (`backbone/`) or a reference to it.

        Raises:
            ValueError: if the backbone has no name or path to refer to and is not saved.
        """
        folder = Path(save_directory)
        config = ValueSteerConfig(**{**self.config.to_dict(), "backbone": self.backbone.name_or_path or None})
        if save_backbone:
            config.backbone = None
            self.backbone.save_pretrained(folder / _BACKBONE_FOLDER, **kwargs)
        elif config.backbone is None:
            raise ValueError("This backbone has no Hub id or folder to refer to: pass `save_backbone=True`.")
        self.value_head.save_pretrained(folder / _HEAD_FOLDER)
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, save_backbone: bool = False, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; keyword arguments of [`~hf_value_steer.hub.push`].

        Returns:
            The URL of the commit.
        """
        return push(lambda folder: self.save_pretrained(folder, save_backbone=save_backbone), repo_id, **kwargs)


register(ValueSteerConfig)
AutoModelForCausalLM.register(ValueSteerConfig, ValueSteerForCausalLM)
