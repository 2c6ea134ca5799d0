"""A value head bound to one model and one call: where it lives, what it accepts, whether it fits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone import feature_width, fingerprint
from hf_value_steer.configuration import SteeringConfig
from hf_value_steer.modeling import ValueHead
from hf_value_steer.policy import Polarity, acceptable


@dataclass(frozen=True)
class Scorer:
    """A head with one threshold a row (`(batch,)`, float32)."""

    head: ValueHead
    threshold: Tensor

    @property
    def polarity(self) -> Polarity:
        return self.head.config.polarity  # type: ignore[no-any-return]

    def values(self, features: Tensor) -> Tensor:
        """Values in (0, 1), or NaN, of features `(..., width)`, on the device of the thresholds.

        The head goes to where the features are: with `device_map` or offloading, no weight tells that beforehand.
        """
        if self.head.device != features.device:
            self.head.to(features.device)
        return self.head(features).values.to(self.threshold.device)  # type: ignore[no-any-return]

    def accepts(self, values: Tensor) -> Tensor:
        """Which rows' values `(batch,)` pass their threshold."""
        return acceptable(values, self.threshold, self.polarity)


def bind(config: SteeringConfig, head: ValueHead, batch_size: int, device: torch.device) -> Scorer:
    """A scorer for `batch_size` rows, thresholds on `device`.

    Raises:
        ValueError: if there is no threshold, or not one a row.
    """
    threshold = head.config.threshold if config.threshold is None else config.threshold
    if threshold is None:
        raise ValueError("`threshold` is missing: this value head has no default threshold, so pass one in (0, 1).")
    if isinstance(threshold, tuple) and len(threshold) != batch_size:
        raise ValueError(f"`threshold` holds {len(threshold)} numbers, but the batch has {batch_size} rows.")
    return Scorer(head, torch.tensor(threshold, dtype=torch.float32, device=device).expand(batch_size))


def load_head(config: SteeringConfig, model: PreTrainedModel) -> ValueHead:
    """Load the head that `config` names if need be, and check that it fits `model`.

    Raises:
        ValueError: if there is no head, or it is for another backbone or another width.
    """
    if config.value_head is None:
        raise ValueError(f'`value_head` is missing from the "{config.method}" config: pass a ValueHead or its Hub id.')
    head = ValueHead.from_pretrained(config.value_head) if isinstance(config.value_head, str) else config.value_head
    if not isinstance(head, ValueHead):
        raise TypeError(f"`value_head` has to be a ValueHead, got a {type(head).__name__}.")
    check_fit(head, model, config.allow_backbone_mismatch)
    return head


def check_fit(head: ValueHead, model: PreTrainedModel, allow_backbone_mismatch: bool = False) -> None:
    """Refuse a head of another width, with weights that are not finite, or trained on another backbone."""
    width = feature_width(model)
    if head.config.hidden_size != width:
        raise ValueError(
            f"`value_head` was trained on hidden_size={head.config.hidden_size} (backbone {head.config.backbone!r}), "
            f"but the feature of this {type(model).__name__} has width {width}; load the matching head."
        )
    head.require_finite()
    expected = head.config.backbone_fingerprint
    if expected and not allow_backbone_mismatch and (found := fingerprint(model)) != expected:
        raise ValueError(
            f"`value_head` was trained on backbone {head.config.backbone!r} with fingerprint {expected}, but this "
            f"model ({model.name_or_path!r}) has {found}: its values would mean nothing. Load the matching head or "
            "backbone, or pass `allow_backbone_mismatch=True` if you know that they fit."
        )


def require_finite(values: Tensor, live: Tensor, step: int) -> None:
    """Stop the generation if a live row has a NaN among its values, `(rows, ...)`: nothing is emitted unchecked.

    Raises:
        RuntimeError: names the rows and the step.
    """
    broken = values.isnan().flatten(1).any(dim=-1) if values.dim() > 1 else values.isnan()
    if bool((broken & live).any()):
        rows = (broken & live).nonzero().flatten().tolist()
        raise RuntimeError(
            f"The value head returned a value that is not finite at new token {step} in row(s) {rows}. The generation "
            "was stopped; the token was not emitted. Check the head's weights and the backbone's dtype."
        )
