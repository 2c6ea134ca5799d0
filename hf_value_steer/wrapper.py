"""`ValueSteerForCausalLM`: a backbone and its value head as one model, with the methods of a `PreTrainedModel`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_value_steer.backbone.features import FINAL, Features, collected
from hf_value_steer.backbone.points import named_arguments
from hf_value_steer.configuration.methods import MethodConfig
from hf_value_steer.configuration.parse import ValueSteer, parse_configs, parse_value_steer
from hf_value_steer.configuration.wrapper import ValueSteerConfig
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.files.reading import ACCESS, LOCATION, find, read_object, reading, refuse_misspelt
from hf_value_steer.files.schema import register
from hf_value_steer.files.upload import push
from hf_value_steer.generate import generate
from hf_value_steer.generation.decoding import configured
from hf_value_steer.generation.scorer import layers_read, require_fit
from hf_value_steer.heads.value_head import ValueHead


_HEAD_FOLDER, _BACKBONE_FOLDER = "value_head", "backbone"


@dataclass
class ValueSteerCausalLMOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """[`~transformers.modeling_outputs.CausalLMOutputWithPast`] and `token_values`.

    Args:
        token_values (`torch.FloatTensor` of shape `(batch, positions)`): value of each position that has logits.
    """

    token_values: Tensor | None = None


class ValueSteerForCausalLM(PreTrainedModel):  # type: ignore[misc]
    r"""A frozen backbone and a value head: `generate` is steered, `forward` also returns `token_values`.

    It is no `GenerationMixin`: the backbone is, and it alone is what generates. What takes a model (vectors, logits
    processors, [`enable_value_steer`]) acts on the backbone inside.

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
    output_modalities = ("text",)

    def __init__(self, backbone: PreTrainedModel, value_head: ValueHead, value_steer: ValueSteer | None = None):
        methods = parse_configs(value_steer or {"method": "filter"}).values()
        require_fit(value_head, backbone, any(method.allow_backbone_mismatch for method in methods))
        super().__init__(
            ValueSteerConfig(
                backbone=backbone.name_or_path or None, value_steer=[method.to_dict() for method in methods]
            )
        )
        self.backbone, self.value_head = backbone, value_head
        self.config.speak_for(backbone.config)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property
    def generation_config(self) -> GenerationConfig:
        """The backbone's, whose `generate` reads it."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if "backbone" in self._modules:  # `PreTrainedModel` makes one before
            self.backbone.generation_config = config

    @property
    def device(self) -> Any:
        return self.backbone.device

    @property
    def dtype(self) -> Any:
        return self.backbone.dtype

    @property
    def hf_device_map(self) -> Any:
        """The backbone's, if it has one: a pipeline does not move a model that has."""
        return self.backbone.hf_device_map

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> ValueSteerCausalLMOutput:
        """The backbone's forward, and the values of the positions that it computed logits for.

        Raises:
            UnsupportedError: with a head over time.
        """
        head = self.value_head
        if head.remembers:
            raise UnsupportedError(
                f"This head remembers (`temporal`={head.config.temporal!r}) from the prompt's last token on, and a "
                "forward is not told which that is: get values from `score_text` or `generate`, logits from "
                "`model.backbone`."
            )
        layers = layers_read(head, self.backbone)
        with collected(self.backbone, layers) as seen:
            outputs = self.backbone(*args, **{**kwargs, "return_dict": True})
        asked = named_arguments(self.backbone, args, kwargs).get("logits_to_keep")
        feature = _with_logits(seen[-1], asked, outputs.logits.shape[1]).of(layers)
        return ValueSteerCausalLMOutput(**outputs, token_values=head.to(feature.device)(feature).value)

    def generate(self, *args: Any, value_steer: ValueSteer | None = None, **kwargs: Any) -> Any:
        """The backbone's `generate`, steered; configs without a head use this model's.

        Args:
            value_steer: overrides the default of this model, and so does that of the call's generation config, or of
                the model's. For unsteered text use `model.backbone.generate`.
        """
        if value_steer is None:
            given = [kwargs.get("generation_config"), *args[1:2], self.generation_config]
            value_steer = configured(each for each in given if isinstance(each, GenerationConfig))
        head, methods = self.value_head, parse_value_steer(value_steer or self.config.value_steer).values()
        steer = [each.with_value_head(head) if isinstance(each, MethodConfig) else each for each in methods]
        return generate(self.backbone, *args, value_steer=steer, **kwargs)

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """The backbone's [`~transformers.GenerationMixin.compute_transition_scores`]."""
        return self.backbone.compute_transition_scores(*args, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        value_head: ValueHead | str | os.PathLike[str] | None = None,
        value_steer: ValueSteer | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load what `save_pretrained` wrote, or put a plain backbone and a head together.

        `cache_dir`, `force_download`, `local_files_only`, `proxies` and `token` are about everything that is loaded.
        `revision` and `subfolder` say where in the repository named first to look, and so are not about a `value_head`
        or a backbone in another one: load a head with its own revision by [`ValueHead.from_pretrained`].

        Args:
            pretrained_model_name_or_path: Hub id or folder of a backbone, or of a saved `ValueSteerForCausalLM`.
            value_head ([`ValueHead`] or `str`, *optional*): the head, its Hub id or folder; required for a plain
                backbone, in place of its own for a saved model.
            value_steer (*optional*): how `generate` steers by default.
            revision (`str`, *optional*), token (*optional*): as in `transformers`, see above.
            config (*optional*): of the backbone, or of the saved model.
            kwargs: the others of those above, and arguments of the backbone's `from_pretrained` (`dtype`, ...).

        Raises:
            OSError: if there is nothing there, or the Hub cannot be reached.
            ArtefactError: if a file of the head, or the config, is damaged.
            ValueError: for a plain backbone without `value_head`.
            MismatchError: if the head does not fit the backbone.
        """
        source = str(pretrained_model_name_or_path)
        kwargs |= {"revision": revision, "token": token}
        location = {name: given for name in LOCATION if (given := kwargs.pop(name, None)) is not None}
        access = {name: given for name, given in location.items() if name in ACCESS}
        own = _own_config(source, config, location)
        if own is None and value_head is None:
            raise ValueError(f"{source} is a plain backbone: pass `value_head=`, a ValueHead or its Hub id.")
        if value_head is None:
            head = ValueHead.from_pretrained(source, **_deeper(location, _HEAD_FOLDER))
        else:
            named = isinstance(value_head, str | os.PathLike)
            head = ValueHead.from_pretrained(value_head, **access) if named else value_head
        if own is None:
            place, kwargs = location, kwargs | {"config": config}
        elif own.backbone is None:
            place = _deeper(location, _BACKBONE_FOLDER)
        else:
            source, place = own.backbone, {"revision": own.backbone_revision, "subfolder": own.backbone_subfolder}
            place = access | {name: given for name, given in place.items() if given is not None}
        refuse_misspelt(source, "backbone", place.get("revision"))
        loaded = AutoModelForCausalLM.from_pretrained(source, **place, **kwargs)
        backbone, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        if isinstance(backbone, cls):  # older references to a backbone inside a saved model did not say where in it
            backbone = backbone.backbone
        model = cls(backbone, head, value_steer or (own and own.value_steer))
        if not os.path.isdir(source):
            model.config.backbone_revision = place.get("revision")
        model.config.backbone_subfolder = place.get("subfolder")
        return (model, *info) if info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], save_backbone: bool = False, **kwargs: Any
    ) -> None:
        """Write the config, the head (`value_head/`), and the backbone (`backbone/`) or a reference to it.

        A reference names the revision and subfolder that `from_pretrained` was asked for. For a backbone that was
        loaded otherwise, set `config.backbone_revision` first.

        Raises:
            ValueError: if the backbone has no name or path to refer to and is not saved.
        """
        folder, record = Path(save_directory), self.config.to_dict()
        name = None if save_backbone else self.backbone.name_or_path or None
        if name is None and not save_backbone:
            raise ValueError("This backbone has no Hub id or folder to refer to: pass `save_backbone=True`.")
        if name != self.config.backbone:
            record |= {"backbone": name, "backbone_revision": None, "backbone_subfolder": None}
        if save_backbone:
            self.backbone.save_pretrained(folder / _BACKBONE_FOLDER, **kwargs)
        self.value_head.save_pretrained(folder / _HEAD_FOLDER)
        config = ValueSteerConfig(**record)
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, save_backbone: bool = False, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; keyword arguments of [`~hf_value_steer.files.upload.push`].

        Returns:
            The URL of the commit.
        """
        return push(lambda folder: self.save_pretrained(folder, save_backbone=save_backbone), repo_id, **kwargs)


def _with_logits(features: Features, asked: Any, count: int) -> Features:
    """Those of the `count` positions that have logits: the last ones, or the positions that were `asked` for."""
    kept = asked if isinstance(asked, Tensor) else slice(-count, None)
    return Features({layer: state if layer == FINAL else state[:, kept] for layer, state in features.items()})


def _own_config(source: str, config: PreTrainedConfig | None, location: Mapping[str, Any]) -> ValueSteerConfig | None:
    """The config of a saved [`ValueSteerForCausalLM`]; `None` if this is a plain backbone."""
    if config is not None:
        return config if isinstance(config, ValueSteerConfig) else None
    path = find(source, "config.json", "model", **location)
    if path is None:  # as where there are GGUF files, or adapters
        return None
    with reading(path, "config of a model"):
        record = read_object(path)
        if record.get("model_type") not in (ValueSteerConfig.model_type, ValueSteerConfig.old_model_type):
            return None
        return ValueSteerConfig.from_dict(record)  # type: ignore[no-any-return]


def _deeper(location: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The location of a folder in there."""
    return {**location, "subfolder": "/".join(filter(None, (location.get("subfolder"), folder)))}


register(ValueSteerConfig)
AutoModelForCausalLM.register(ValueSteerConfig, ValueSteerForCausalLM)
