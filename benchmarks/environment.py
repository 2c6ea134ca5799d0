"""Where and when a benchmark ran, and its results."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def command() -> str:
    """What was run, as `python -m`."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None  # benchmarks are run by their name
    return " ".join(["python -m", spec.name, *sys.argv[1:]])


def describe(**versions: str) -> dict[str, Any]:
    """Date, machine and versions, `versions` of further packages among them, for the head of a result file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **versions,
        },
    }


def save(document: dict[str, Any], path: Path) -> None:
    """Write the results as indented JSON, in their order."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
