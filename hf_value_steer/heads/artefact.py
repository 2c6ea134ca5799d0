"""What the trained parts of this library have in common: float32, safetensors and JSON only, refused if incomplete."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_value_steer.backbone.weights import until_weights_change
from hf_value_steer.cards.parts import Facts
from hf_value_steer.errors import ArtefactError
from hf_value_steer.files.reading import LOCATION, find, read_object, reading, tensor_shapes
from hf_value_steer.files.upload import push


class Artefact(PreTrainedModel):  # type: ignore[misc]
    """A trained part. Always float32, whatever is asked for."""

    base_model_prefix = ""
    kind: ClassVar[str]

    def _apply(self, fn: Any, recurse: bool = True) -> "Artefact":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or the Hub: `config.json` and `model.safetensors`, never a pickle.

        The sizes that the config asks for are compared with the weights before anything of that size is made.

        Raises:
            OSError: if there is nothing there, or the Hub cannot be reached.
            ArtefactError: if this is something else, or damaged, or if weights are missing, do not fit the config, are
                not of floating-point numbers, or are not finite.
        """
        source = str(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        location = {name: kwargs.pop(name) for name in LOCATION if name in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls._read_config(source if config is None else str(config), location, kwargs)
        files = cls._find_weights(source, kwargs.get("variant"), location)
        kwargs |= {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
        with reading(files[0], cls.kind):
            cls._refuse_unfitting(config, files)
        folder = files[0].parent  # from here on the Hub is not asked, so these are the files that were looked at
        artefact, info = super().from_pretrained(folder, *args, config=config, output_loading_info=True, **kwargs)
        with reading(files[0], cls.kind):
            artefact.require_finite()
        artefact.name_or_path = artefact.config.name_or_path = source
        return (artefact, info) if wants_info else artefact

    @classmethod
    def _read_config(
        cls, source: str, location: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The config, with what `kwargs` say otherwise, and the `kwargs` that are not about it."""
        path, own = find(source, "config.json", cls.kind, **location), cls.config_class
        with reading(path or source, cls.kind):
            if path is None or own.renewed(read_object(path)).get("model_type") != own.model_type:
                raise ArtefactError(
                    f"this is no {cls.kind}: config.json is missing or not of model_type {own.model_type}; pass the "
                    "folder that `save_pretrained` wrote, or its Hub id."
                )
            own.from_pretrained(path)
        return own.from_pretrained(path, return_unused_kwargs=True, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def _find_weights(cls, source: str, variant: str | None, location: Mapping[str, Any]) -> list[Path]:
        """`model.safetensors`, or the files that its index names."""
        of = "" if variant is None else f".{variant}"
        whole = find(source, f"model{of}.safetensors", cls.kind, optional=True, **location)
        if whole is not None:
            return [whole]
        index = find(source, f"model.safetensors.index{of}.json", cls.kind, optional=True, **location)
        with reading(index or source, cls.kind):
            names = sorted(set(read_object(index)["weight_map"].values())) if index else []
            files = [find(source, name, cls.kind, optional=True, **location) for name in names]
            if not files or None in files:
                missing = [name for name, file in zip(names, files, strict=True) if file is None]
                raise ArtefactError(
                    f"there is no {', '.join(missing) or f'model{of}.safetensors'}, so this {cls.kind} has no weights "
                    "(pickles are not read): save it, or download it, again."
                )
            return files  # type: ignore[return-value]

    @classmethod
    def _refuse_unfitting(cls, config: PreTrainedConfig, files: Sequence[Path]) -> None:
        """Raise an `ArtefactError` unless the files hold the weights that the config describes, and nothing else."""
        found = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
        try:
            with torch.device("meta"):
                expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        except (RuntimeError, TypeError) as error:  # PyTorch's overflow; the config itself was checked
            raise ArtefactError(f"no {cls.kind} can have the sizes in config.json: save it again.") from error
        common = expected.keys() & found.keys()
        problems = {
            "missing_keys": expected.keys() - common,
            "unexpected_keys": found.keys() - common,
            "mismatched_keys": {
                f"{name} of shape {found[name]} instead of {expected[name]}"
                for name in common
                if found[name] != expected[name]
            },
        }
        if listed := [f"{problem} {', '.join(sorted(names)[:4])}" for problem, names in problems.items() if names]:
            raise ArtefactError(
                f"these are not the weights of the {cls.kind} that config.json describes: {'; '.join(listed)}. Load "
                "the two files that were saved together."
            )

    def facts(self) -> Facts:
        """What its card tells of it."""
        return Facts(self.config.to_dict(), sum(parameter.numel() for parameter in self.parameters()))

    def write_card(self, folder: Path) -> None:
        """Write the generated card as `README.md`, unless the folder has one."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors`. Where there is no `README.md` yet, one is generated."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.write_card(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes as one commit; arguments of [`~hf_value_steer.files.upload.push`].

        Returns:
            The URL of the commit.
        """
        return push(self.save_pretrained, repo_id, **kwargs)

    def require_finite(self) -> None:
        """Raise an `ArtefactError` if a weight is NaN or infinite."""
        if bad := _not_finite(self):
            raise ArtefactError(
                f"The {self.kind} holds NaN or infinite weights in {', '.join(bad)}: train it again, or load another."
            )


@until_weights_change
def _not_finite(artefact: Artefact) -> list[str]:
    """Names of the weights that are not."""
    return [name for name, tensor in artefact.state_dict().items() if not tensor.isfinite().all()]
