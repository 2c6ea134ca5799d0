"""How large the residual stream is at every layer: what the strength of a direction is measured against."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.activation.apply import steered
from hf_value_steer.activation.residual import read_residuals
from hf_value_steer.activation.vectors import Directions
from hf_value_steer.backbone.parts import num_layers


@torch.no_grad()
def mean_norms(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch_size: int = 16, skip: int = 1
) -> Tensor:
    """Mean Euclidean norm of the residual behind every layer, over all tokens of some texts.

    Padding does not count, and neither do the first `skip` tokens of a text: many models park a norm of a hundred
    times the others' there (an attention sink), so that a mean with it would say how long the texts are.

    Args:
        model: as it is: unsteered, where vectors are scaled by the norms.
        sequences: token ids of each text; a few dozen are enough.
        batch_size (`int`): texts in one forward pass.
        skip (`int`): tokens at the beginning of each text that do not count.

    Returns:
        `torch.FloatTensor` of shape `(layers,)`.

    Raises:
        ValueError: if no token counts, or a norm is not finite.
    """
    layers = range(num_layers(model))
    totals, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    for residuals in _tokens(model, sequences, layers, batch_size, skip):
        tokens += len(residuals[0])
        for layer, hidden in residuals.items():
            totals[layer] += hidden.norm(dim=-1).double().sum().cpu()
    if not tokens:
        raise ValueError(f"`sequences` have no token beyond the first {skip} of each: pass longer texts.")
    if not totals.isfinite().all():
        raise ValueError("The residual stream of this model has norms that are not finite on these texts.")
    return (totals / tokens).float()


@torch.no_grad()
def relative_influence(
    model: PreTrainedModel,
    vectors: Directions,
    sequences: Sequence[Sequence[int]],
    multiplier: float = 1.0,
    batch_size: int = 16,
    skip: int = 1,
) -> Tensor:
    """What steering does inside the running model: mean norm of what is added to mean norm of what it is added to.

    Each layer is steered alone, so that the stream which it meets is the model's own. Steered together, what the
    layers add piles up behind one another.

    Args:
        vectors: of this model; the measured ratio should be their `rho` times `multiplier`.
        model, sequences, batch_size, skip: as in [`mean_norms`].
        multiplier (`float`): as in [`steered`].

    Returns:
        `torch.FloatTensor` of shape `(len(vectors.layers),)`.
    """

    def streams(layers: Sequence[int]) -> dict[int, Tensor]:
        batches = list(_tokens(model, sequences, layers, batch_size, skip))
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in layers}

    plain, ratios = streams(vectors.layers), []
    for layer in vectors.layers:
        with steered(model, vectors.only([layer]), multiplier):
            changed = streams([layer])[layer]
        ratios.append((changed - plain[layer]).norm(dim=-1).mean() / plain[layer].norm(dim=-1).mean())
    return torch.stack(ratios).cpu()


def _tokens(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], layers: Sequence[int], batch_size: int, skip: int
) -> Iterator[dict[int, Tensor]]:
    """Residuals of the tokens of each batch that count, `(tokens, width)`, float32."""
    for residuals, _, mask in read_residuals(model, sequences, layers, batch_size):
        counted = mask[:, skip:].bool()
        yield {layer: hidden[:, skip:][counted.to(hidden.device)].float() for layer, hidden in residuals.items()}
