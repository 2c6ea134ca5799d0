"""`SteeringVectors`: directions with all that can be done with them."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from hf_value_steer.activation.apply import Injection, steered
from hf_value_steer.activation.bake import bake
from hf_value_steer.activation.norms import mean_norms
from hf_value_steer.activation.vectors import Directions
from hf_value_steer.choices import VectorMode
from hf_value_steer.configuration.activate import Tokens
from hf_value_steer.files.kept import given_or_loaded


class SteeringVectors(Directions):
    """Unit directions of the residual stream, one a layer, their strengths, and what can be done with them.

    What is added behind layer `l` is `multiplier * strengths[l] * directions[l]`. Takes the arguments of
    [`Directions`], which is how they are held, saved and loaded.
    """

    def scale(
        self, model: PreTrainedModel, sequences: Sequence[Sequence[int]], rho: float | None = None
    ) -> "SteeringVectors":
        """[`mean_norms`] of the model on some texts (token ids), then [`scaled_to`]: strengths follow these norms."""
        self.check_fit(model)
        return self.scaled_to(mean_norms(model, sequences), rho, texts=len(sequences))

    def apply(
        self,
        model: PreTrainedModel,
        multiplier: float | Sequence[float] = 1.0,
        mode: VectorMode = "broadcast",
        tokens: Tokens = "all",
        allow_backbone_mismatch: bool = False,
    ) -> AbstractContextManager[Injection]:
        """Steer everything that `model` does inside a `with` block; see [`~hf_value_steer.activation.apply.steered`].

        ```python
        with vectors.apply(model, multiplier=-0.25):
            out = model.generate(**inputs)
        ```
        """
        return steered(model, self, multiplier, mode, tokens, allow_backbone_mismatch)

    def bake(
        self, model: PreTrainedModel, multiplier: float, output_dir: str | os.PathLike[str], **options: Any
    ) -> dict[str, Any]:
        """Write a checkpoint that adds the vectors at every position, by itself; compare it with the steered model.

        It is loaded by plain `AutoModelForCausalLM.from_pretrained`, unless the report's `kind` is `"custom code"`,
        which needs `trust_remote_code=True`. The report lies beside it, too, in `steering/report.json`.

        Args:
            model: the backbone, not quantised; it stays as it is.
            multiplier (`float`): how much of the vectors.
            output_dir: folder, which must not be there yet.
            options: `sequences`, token ids of the texts on which the two are compared (random tokens by default);
                `tokenizer`, which is saved beside it; `allow_backbone_mismatch`; `max_shard_size`.

        Returns:
            The report: `kind`, `max_logit_change` (by steering), `max_logit_difference` (between the steered model and
            the checkpoint), `same_greedy_tokens` (share), `offset_rounding`, `original`, ...

        Raises:
            ValueError: for vectors that do not fit, a quantised, offloaded or steered model, a folder that is there,
                and if the checkpoint does not compute what the steered model does. Nothing is written then.
        """
        return bake(model, self, multiplier, output_dir, **options)


def vectors_of(given: object) -> SteeringVectors:
    """What an [`ActivationConfig`] holds: the vectors themselves, or what their name stands for, loaded once.

    Raises:
        TypeError: if it is something else.
    """
    vectors = given_or_loaded(SteeringVectors.from_pretrained, given)
    if not isinstance(vectors, SteeringVectors):
        raise TypeError(f"`vectors` have to be SteeringVectors, a Hub id or a folder, got {vectors!r}.")
    return vectors
