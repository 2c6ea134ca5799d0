"""Make the golden files of `tests/artifact/test_imported_vectors.py` with the real packages.

    python -m tests.golden_vectors

Vectors of both libraries on one tiny model, and the logits that each of them gets there.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.families import build


FOLDER = Path(__file__).parent / "artifact" / "golden"
IDS = torch.tensor([[5, 17, 3, 44, 71, 8, 23, 9]])
COEFFICIENT = 1.5


def raw_vectors() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {layer: torch.randn(32, generator=generator) * (layer + 1) for layer in (0, 1)}


@torch.no_grad()
def by_steering_vectors() -> torch.Tensor:
    """Logits under the package `steering-vectors`."""
    from steering_vectors import SteeringVector

    model = build("llama", "eager")
    with SteeringVector(raw_vectors()).apply(model, multiplier=COEFFICIENT):
        return model(IDS).logits


def control_vector():
    """A `ControlVector` of the package `repeng`."""
    np.float_ = np.float64  # which repeng 0.4.0 still asks NumPy for
    from repeng import ControlVector

    directions = {layer: vector.numpy() for layer, vector in raw_vectors().items()}
    return ControlVector(model_type="llama", directions=directions)


@torch.no_grad()
def by_repeng() -> torch.Tensor:
    """Logits under the package `repeng`."""
    vector, model = control_vector(), build("llama", "eager")
    from repeng import ControlModel

    controlled = ControlModel(model, [0, 1])
    controlled.set_control(vector, COEFFICIENT)
    return controlled(IDS).logits


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    control_vector().export_gguf(FOLDER / "repeng.gguf")
    logits = {"steering_vectors": by_steering_vectors(), "repeng": by_repeng()}
    save_file(logits, FOLDER / "imported_logits.safetensors", metadata={"made_by": "python -m tests.golden_vectors"})
