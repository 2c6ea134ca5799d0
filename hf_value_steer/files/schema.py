"""How the configs of saved artefacts change over time: old files are read, newer ones than we know are refused."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from hf_value_steer.errors import ArtefactError
from hf_value_steer.files.reading import reading


# 1: model types that others could claim, too, and no version in the file. 2: `hvs_*` types, `schema_version`.
SCHEMA = 2

# What `transformers` itself writes into a config.json or passes while it loads one.
INHERITED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "torch_dtype",
    }
)


class VersionedConfig(PreTrainedConfig):  # type: ignore[misc]
    """What the configs of artefacts have in common: a model type of ours, and the names that it had before.

    Attributes:
        old_model_type (`str`): that of files of schema 1.
    """

    old_model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found, rest = super().get_config_dict(*args, **kwargs)
        return cls.renewed(found), rest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Read the JSON form of any schema up to ours.

        Raises:
            ArtefactError: if a newer version of this library wrote it; and, where it comes from a file, if that is
                damaged.
        """
        file = kwargs.get("name_or_path")  # said by `AutoConfig`, whose own errors would not name it
        with nullcontext() if file is None else reading(file, cls.__name__):
            return super().from_dict(cls.renewed(config_dict), **kwargs)

    @classmethod
    def renewed(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record of any schema up to ours, as one of ours."""
        if "schema_version" in record:  # before the fields, whose meaning it says
            check_schema(record["schema_version"])
        if record.get("model_type") == cls.old_model_type:
            return {**record, "model_type": cls.model_type, "schema_version": SCHEMA}
        return dict(record)


def check_schema(version: Any) -> None:
    """Raise an `ArtefactError` unless this is a schema that this version of the library knows."""
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise ArtefactError(
            f"`schema_version` is {version!r}, but this version of hf-value-steer reads 1 to {SCHEMA}: what you load "
            "was made by a newer one, so upgrade with `pip install -U hf-value-steer`."
        )


def register(config_class: type[VersionedConfig]) -> None:
    """Let `AutoConfig` read files of this class, those under its old model type included."""
    AutoConfig.register(config_class.model_type, config_class)

    class Old(PreTrainedConfig):  # type: ignore[misc]
        """Stands for the old model type, and is never made: what it would be becomes a config of today."""

        model_type = config_class.old_model_type

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return config_class(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
            return config_class.from_dict(config_dict, **kwargs)

    AutoConfig.register(Old.model_type, Old)
