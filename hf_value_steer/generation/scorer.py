"""A value head bound to one model and one call: where it lives, what it accepts, whether it fits."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.features import ONLY_FINAL, Layer, features_width, points_of, resolve_layers
from hf_value_steer.backbone.parts import refuse_other_backbone
from hf_value_steer.calibration import Calibration
from hf_value_steer.calibration.filtering import row_thresholds
from hf_value_steer.choices import Polarity
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.errors import MismatchError, ScoringError, UnsupportedError
from hf_value_steer.files.kept import given_or_loaded
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.in_the_loop import TextJudge, text_judge
from hf_value_steer.policy import acceptable, answered


@dataclass
class Scorer:
    """A head with one threshold, and one memory, a row.

    Methods and the vLLM adapter make one with [`bind`]. Features go into [`values`], and values into [`accepts`]. The
    features of tokens that are kept go into [`remember`].

    Args:
        head: the head.
        threshold (`torch.FloatTensor` of shape `(batch,)`): NaN, which accepts nothing, until [`start`] sets it.
        least_growth (`float`, *optional*): from a calibration of mode `"martingale"`: growth of the log odds since the
            prompt that is not acceptable any more.
        reads (`tuple`): the layers of the feature.

    Attributes:
        memory (`torch.FloatTensor` of shape `(batch, 1 + remembers)`): see [`ValueHead.memory`].
    """

    head: ValueHead
    threshold: Tensor
    least_growth: float | None = None
    reads: tuple[Layer, ...] = ONLY_FINAL

    def __post_init__(self) -> None:
        self.memory = self.head.memory(len(self.threshold))

    @property
    def polarity(self) -> Polarity:
        return self.head.config.polarity  # type: ignore[no-any-return]

    def of_row(self, row: int) -> "Scorer":
        """One for one row alone."""
        one = copy.copy(self)
        one.threshold, one.memory = self.threshold[row : row + 1], self.memory[row : row + 1]
        return one

    def start(self, prompt_values: Tensor) -> None:
        """Set the thresholds that follow the values of the prompts, `(batch,)`."""
        if self.least_growth is not None:
            require_finite(prompt_values, torch.ones_like(prompt_values, dtype=torch.bool), 0)
            rows = row_thresholds(self.least_growth, prompt_values.numpy(force=True), self.polarity)
            self.threshold = torch.from_numpy(rows).to(self.threshold.device)

    def values(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Values in (0, 1), or NaN, of the tokens that may come next, on the device of the thresholds.

        If the head is on another device than the features, a copy of it is moved there. With `device_map` or
        offloading, that device is not known before the first forward; and the head itself may be in use by others.

        Args:
            features (`torch.FloatTensor` of shape `(n, ..., width)`): of these tokens.
            rows (`torch.LongTensor` of shape `(n,)`, *optional*): the rows of the batch that they may go on with, all
                if left out.
        """
        self._go_to(features.device)
        if not self.head.remembers:
            return answered(self.head(features).value).to(self.threshold.device)
        memory = self.memory if rows is None else self.memory[rows.to(features.device)]
        memory = memory.view(len(features), *[1] * (features.dim() - 2), -1).expand(*features.shape[:-1], -1)
        return answered(self.head(features[..., None, :], memory=memory).value[..., 0]).to(self.threshold.device)

    def values_of_tokens(self, features: Tensor, begins: Sequence[int]) -> Tensor:
        """Values `(batch, tokens)` of tokens that follow one another, which are remembered.

        Args:
            features (`torch.FloatTensor` of shape `(batch, tokens, width)`): of these tokens.
            begins (sequence of `int`): the first token of each row that is remembered. A head over time has no value,
                which is NaN, for those before it.
        """
        if not self.head.remembers:
            return self.values(features)
        self._go_to(features.device)
        values = features.new_full(features.shape[:2], torch.nan, dtype=torch.float32)
        for row, begin in enumerate(begins):
            if begin < features.shape[1]:
                output = self.head(features[row, begin:], memory=self.memory[row])
                values[row, begin:], self.memory[row] = output.value, output.memory
        return answered(values).to(self.threshold.device)

    def remember(self, features: Tensor) -> None:
        """Take in the token that each row goes on with, by its features `(batch, width)`."""
        if self.head.remembers:
            self._go_to(features.device)
            self.memory = self.head(features[:, None], memory=self.memory).memory

    def _go_to(self, device: torch.device) -> None:
        if self.head.device != device:
            self.head = copy.deepcopy(self.head).to(device)
            self.memory = self.memory.to(device)

    def accepts(self, values: Tensor) -> Tensor:
        """Which rows' values `(batch,)` pass their threshold."""
        return acceptable(values, self.threshold, self.polarity)


def bind(
    config: SteeringConfig,
    head: ValueHead | TextJudge,
    batch_size: int,
    device: torch.device,
    reads: tuple[Layer, ...] = ONLY_FINAL,
) -> Scorer:
    """A scorer for `batch_size` rows, thresholds on `device`, of a head that reads the layers `reads`.

    Raises:
        ValueError: if there is no threshold, not one a row, or none that keeps the promise that `alpha` asks for.
    """
    config = config.settled(head.config.operating_point)
    threshold = head.config.threshold if config.threshold is None else config.threshold
    least_growth = None
    if config.alpha is not None:
        calibration = fitting_calibration(config, head)
        threshold = calibration.promised_threshold(config.alpha)
        if calibration.mode == "martingale":
            threshold, least_growth = math.nan, threshold
    if threshold is None:
        raise ValueError(
            "`threshold` is missing: this value head has no default threshold, so pass one in (0, 1), or set it with "
            "`hf-value-steer calibrate`."
        )
    if isinstance(threshold, tuple) and len(threshold) != batch_size:
        raise ValueError(f"`threshold` holds {len(threshold)} numbers, but the batch has {batch_size} rows.")
    rows = torch.tensor(threshold, dtype=torch.float32, device=device).expand(batch_size)
    return Scorer(cast(ValueHead, head), rows, least_growth, reads)  # of a judge of text nobody asks for values


def fitting_calibration(config: SteeringConfig, head: ValueHead | TextJudge) -> Calibration:
    """The calibration that `alpha` of `config` asks; a `MismatchError` if it promises something else."""
    asked, calibration = f"`alpha`={config.alpha}", head.calibration
    if calibration is None:
        raise MismatchError(
            f"{asked} needs a calibrated head, and this one has no calibration.json: pass `threshold`."
        )
    if calibration.method != config.method:
        raise MismatchError(
            f'{asked} with the method "{config.method}" needs a calibration of that method, but this head was '
            f'calibrated for "{calibration.method}": pass `threshold`, or calibrate it again.'
        )
    if calibration.polarity != head.config.polarity or calibration.head_fingerprint not in (None, head.fingerprint()):
        raise MismatchError(
            f"{asked}: calibration.json is about another head (polarity {calibration.polarity!r}, fingerprint "
            f"{calibration.head_fingerprint}); calibrate this one (polarity {head.config.polarity!r}, fingerprint "
            f"{head.fingerprint()}), or pass `threshold`."
        )
    if calibration.mode == "selective" and isinstance(config, AbstentionConfig):
        if config.patience > 1 or config.min_new_tokens > 0:
            raise MismatchError(
                f"{asked} promises accuracy for rows that stop at their first unacceptable value: leave out "
                "`patience` and `min_new_tokens`, or pass `threshold`."
            )
    return calibration


def load_head(config: SteeringConfig, model: PreTrainedModel) -> ValueHead:
    """Load the head that `config` names if need be, and check that it fits `model`.

    Raises:
        ValueError: if there is no head, or it is for another backbone or another width.
    """
    if config.value_head is None:
        raise ValueError(f'`value_head` is missing from the "{config.method}" config: pass a ValueHead or its Hub id.')
    if text_judge(config.value_head) is not None:
        raise UnsupportedError(
            f"`value_head`={config.value_head!r} is a judge of text: it filters in `generate`, and does nothing else."
        )
    head = given_or_loaded(ValueHead.from_pretrained, config.value_head)
    if not isinstance(head, ValueHead):
        raise TypeError(f"`value_head` has to be a ValueHead, got a {type(head).__name__}.")
    require_fit(head, model, config.allow_backbone_mismatch)
    return head


def layers_read(head: ValueHead, model: PreTrainedModel) -> tuple[Layer, ...]:
    """The layers of `model` that the head reads."""
    return resolve_layers(head.config.feature_layers, model)


def require_fit(head: ValueHead, model: PreTrainedModel, allow_backbone_mismatch: bool = False) -> None:
    """Refuse a head of other layers or another width, with weights that are not finite, or of another backbone."""
    layers = layers_read(head, model)
    points_of(model, layers)
    width = features_width(model, layers)
    if head.config.hidden_size != width:
        raise MismatchError(
            f"`value_head` was trained on hidden_size={head.config.hidden_size} (backbone {head.config.backbone!r}), "
            f"but the feature of this {type(model).__name__} has width {width}; load the matching head. It "
            f"reads the layers {list(layers)}."
        )
    head.require_finite()
    if not allow_backbone_mismatch:
        refuse_other_backbone("value_head", head.config, model)


def require_finite(values: Tensor, live: Tensor, step: int) -> None:
    """Stop the generation if a live row has a NaN for its value, `(rows,)`: nothing is emitted unchecked.

    Raises:
        ScoringError: names the rows and the step.
    """
    refuse_broken(values.isnan() & live, torch.arange(len(live), device=live.device), step)


def refuse_broken(broken: Tensor, rows: Tensor, step: int) -> None:
    """Raise a `ScoringError` if one of `rows` `(n,)` is `broken` `(n,)`: a token could not be checked."""
    if bool(broken.any()):
        raise ScoringError(
            f"The value head returned a value that is not finite at new token {step} in row(s) "
            f"{rows[broken].tolist()}. The generation was stopped; the token was not emitted. Check the head's "
            "weights and the backbone's dtype."
        )
