"""The fingerprint of a backbone, computed from its files: a serving engine keeps the weights in other shapes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_value_steer.backbone.parts import fingerprint_of


def checkpoint_fingerprint(model: str, revision: str | None = None) -> str:
    """[`~hf_value_steer.backbone.parts.fingerprint`] of the checkpoint in a folder or on the Hub.

    Raises:
        ValueError: if the files do not hold the parameters under the names that `transformers` gives them.
    """
    folder = Path(model) if Path(model).is_dir() else _downloaded(model, revision)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return fingerprint_of(_parameters(folder, [name for name, _ in skeleton.named_parameters()]))


def _downloaded(model: str, revision: str | None) -> Path:
    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def _parameters(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(
            f"{folder} does not hold {', '.join(missing[:3])}, so this backbone cannot be identified: set "
            "`allow_backbone_mismatch` if you know that the head fits."
        )
    for name in names:
        with safe_open(places[name], "pt") as file:
            yield name, file.get_tensor(name)
