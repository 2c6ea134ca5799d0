"""What the trained parts of this library have in common: float32, safetensors and JSON only, refused if incomplete."""

import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer import hub


# Arguments of `from_pretrained` that say where files are.
LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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

        Raises:
            OSError: if there is nothing there, or the Hub cannot be reached.
            ValueError: if this is something else, or if weights are missing, do not fit the config, or are not finite.
        """
        source = str(pretrained_model_name_or_path)
        if kwargs.get("config") is None:
            try:
                found, _ = cls.config_class.get_config_dict(source, **kwargs)
            except OSError as error:
                raise OSError(f"No {cls.kind} at {source!r}, neither a folder here nor on the Hub: {error}") from error
            if found.get("model_type") != cls.config_class.model_type:
                raise ValueError(
                    f"{source} is no {cls.kind}: config.json is missing or not of model_type "
                    f"{cls.config_class.model_type}."
                )
        kwargs["use_safetensors"] = True
        wants_info = kwargs.pop("output_loading_info", False)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        artefact, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise ValueError(f"{source}: {problem} {sorted(map(str, info[problem]))}.")
        artefact.require_finite()
        return loaded if wants_info else artefact

    def write_card(self, folder: Path) -> None:
        """Write the generated card as `README.md`, unless the folder has one."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors`. Where there is no `README.md` yet, one is generated."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.write_card(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes as one commit; keyword arguments of [`~hf_value_steer.hub.push`].

        Returns:
            The URL of the commit.
        """
        return hub.push(self.save_pretrained, repo_id, **kwargs)

    def require_finite(self) -> None:
        """Raise a `ValueError` if a weight is NaN or infinite."""
        bad = [name for name, tensor in self.state_dict().items() if not tensor.isfinite().all()]
        if bad:
            raise ValueError(f"The {self.kind} holds NaN or infinite weights in {', '.join(bad)}.")
