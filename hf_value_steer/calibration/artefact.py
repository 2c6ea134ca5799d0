"""`calibration.json`: calibration scores, the thresholds they give, and what those promise."""

import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_value_steer.calibration.abstention import as_flags, selective_threshold
from hf_value_steer.calibration.filtering import (
    allowed_exceedances,
    as_scores,
    as_values,
    growth,
    threshold_above,
    value_threshold,
)
from hf_value_steer.calibration.promises import CONFIDENT, promise
from hf_value_steer.checks import check_choice
from hf_value_steer.choices import HeadMethod, Polarity, PromiseMode
from hf_value_steer.files.reading import read_object, reading
from hf_value_steer.files.writing import write_json


FILE_NAME = "calibration.json"
FORMAT = "hf-value-steer/calibration@1"
CURVE = tuple(step / 100 for step in (*range(1, 10), *range(10, 100, 5)))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where a head's thresholds come from, and what they promise.

    A promise is about new texts that are drawn as the calibration texts were: same kind of prompt, sampler, kernel,
    head and backbone. `"marginal"`, `"pac"`, `"martingale"` and `"selective"` promise one `alpha` that was chosen
    beforehand; who wants to choose it after a look at the curve needs `"uniform"`.

    Args:
        mode (`str`): which promise. `"marginal"`: on average over calibration sets (the +1 conformal quantile);
            `"pac"`: with confidence `1 - delta` in this calibration set (Clopper-Pearson); `"uniform"`: the same for
            every `alpha` at once (Dvoretzky-Kiefer-Wolfowitz); `"martingale"`: as `"marginal"`, with a threshold for
            each row that follows its prompt's value; `"selective"`, for abstention: at most `alpha` of the answers
            that are given are wrong, with confidence `1 - delta` ([`selective_threshold`]).
        method (`str`): `"filter"`: the scores are of safe texts, and `alpha` bounds how many safe texts are
            intervened on. `"abstain"`: the scores are of all texts, and `alpha` bounds how many are ended.
        polarity (`str`): meaning of a high value.
        scores (`tuple` of `float`): one a text, ascending, float32: its most undesirable value, or the growth of its
            log odds in mode `"martingale"`.
        delta (`float`, *optional*): probability that the promise fails, where the mode has one; at most 0.5.
        correct (`tuple` of `bool`, *optional*): for `"selective"`, whether each text's answer is correct.
        groups (`dict`, *optional*): the scores of each group, for thresholds of its own.
        head_fingerprint (`str`, *optional*): [`~hf_value_steer.backbone.parts.fingerprint`] of the head. When it is
            there, another head is refused.
        data (`str`, *optional*), sampling (`dict`, *optional*), kernel (`str`, *optional*), backend (`str`,
            *optional*): digest of the calibration texts and how they were made: what the promise holds for.
    """

    mode: PromiseMode
    method: HeadMethod
    polarity: Polarity
    scores: tuple[float, ...]
    delta: float | None = None
    correct: tuple[bool, ...] | None = None
    groups: Mapping[str, tuple[float, ...]] | None = None
    head_fingerprint: str | None = None
    data: str | None = None
    sampling: Mapping[str, Any] | None = None
    kernel: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("mode", PromiseMode), ("method", HeadMethod), ("polarity", Polarity)):
            check_choice(getattr(self, name), choices, name)
        if (self.mode == "martingale" and self.method == "abstain") or (
            self.mode == "selective" and self.method == "filter"
        ):
            raise ValueError(f"`mode` {self.mode!r} does not exist for method {self.method!r}.")
        for name in ("head_fingerprint", "data", "kernel", "backend"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` has to be a text, got {getattr(self, name)!r}.")
        if not isinstance(self.sampling, Mapping | None):
            raise ValueError(f"`sampling` has to be a dict, got {self.sampling!r}.")
        self._check_delta()
        object.__setattr__(self, "scores", self._ascending(self.scores))
        if self.groups is not None:
            if self.mode == "selective" or not self.groups:
                raise ValueError("`groups` has to hold at least one group, and does not exist for mode 'selective'.")
            groups = {key: self._ascending(scores) for key, scores in sorted(self.groups.items())}
            object.__setattr__(self, "groups", groups)
        if (self.correct is not None) != (self.mode == "selective"):
            raise ValueError("`correct` is for mode 'selective', which needs it.")
        if self.correct is not None:
            object.__setattr__(self, "correct", tuple(as_flags(self.correct, self.n).tolist()))

    def _check_delta(self) -> None:
        if self.mode not in CONFIDENT:
            if self.delta is not None:
                raise ValueError(f"`delta` does not exist for mode {self.mode!r}, got {self.delta}.")
        elif isinstance(self.delta, bool) or not isinstance(self.delta, int | float) or not 0 < self.delta <= 0.5:
            raise ValueError(f"`delta` has to be a number in (0, 0.5] for mode {self.mode!r}, got {self.delta!r}.")

    def _ascending(self, scores: ArrayLike) -> tuple[float, ...]:
        array = as_scores(scores) if self.mode == "martingale" else as_values(scores)
        if (np.diff(array) < 0).any():
            raise ValueError("`scores` have to be in ascending order.")
        return tuple(array.tolist())

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        *,
        mode: PromiseMode = "marginal",
        method: HeadMethod = "filter",
        polarity: Polarity = "undesirable",
        delta: float | None = None,
        prompt_values: ArrayLike | None = None,
        correct: ArrayLike | None = None,
        groups: Sequence[str] | None = None,
        **provenance: Any,
    ) -> "Calibration":
        """Calibrate on one text a prompt; [`one_per_prompt`] chooses them.

        Args:
            scores (`np.float32` array of shape `(n,)`): the most undesirable value of each text among those that the
                method checks, in any order. The filter checks every new token; only *safe* texts count. Abstention
                checks the prompt's value and every new token but the last, after which there is nothing to end; all
                texts count.
            mode, method, polarity: as in the class.
            delta (`float`, *optional*): 0.05 where the mode has one.
            prompt_values (`np.float32` array of shape `(n,)`): for `"martingale"`, the values of the prompts.
            correct (`bool` array of shape `(n,)`): for `"selective"`, whether each answer is correct.
            groups (sequence of `str`, *optional*): the group of each text.
            provenance: `head_fingerprint`, `data`, `sampling`, `kernel`, `backend`.
        """
        values = as_values(scores)
        if (prompt_values is not None) != (mode == "martingale"):
            raise ValueError("`prompt_values` are for mode 'martingale', which needs them.")
        for name, given in (("prompt_values", prompt_values), ("groups", groups)):
            if given is not None and np.shape(given) != values.shape:
                raise ValueError(f"`{name}` has shape {np.shape(given)}, but `scores` has {values.shape}.")
        if prompt_values is not None:
            values = growth(values, as_values(prompt_values, "prompt_values"), polarity)
        order = np.argsort(values, kind="stable")
        ascending = values[order].tolist()
        by_group: dict[str, list[float]] = {}
        if groups is not None:
            for index, score in zip(order.tolist(), ascending, strict=True):
                by_group.setdefault(str(groups[index]), []).append(score)
        return cls(
            mode=mode,
            method=method,
            polarity=polarity,
            scores=tuple(ascending),
            delta=0.05 if delta is None and mode in CONFIDENT else delta,
            correct=None if correct is None else tuple(as_flags(correct, len(values))[order].tolist()),
            groups={key: tuple(scores) for key, scores in by_group.items()} or None,
            **provenance,
        )

    @property
    def n(self) -> int:
        """Number of calibration texts."""
        return len(self.scores)

    @property
    def guarantee(self) -> str:
        """What is promised, in one sentence."""
        return promise(self.mode, self.method, self.n, self.delta, grouped=bool(self.groups))

    def threshold(self, alpha: float, group: str | None = None) -> float:
        """The threshold that keeps the promise at `alpha`, or `math.inf` if there is none.

        Mode `"martingale"` gives the least growth of the log odds instead, for
        [`~hf_value_steer.calibration.filtering.row_thresholds`].

        Args:
            alpha (`float`): in (0, 1).
            group (`str`, *optional*): whose threshold; by default that of all texts together.
        """
        scores = self._scores(group)
        if self.correct is not None and self.delta is not None:
            return selective_threshold(scores, self.correct, alpha, self.delta, self.polarity)
        allowed = allowed_exceedances(self.mode, len(scores), alpha, self.delta)  # type: ignore[arg-type]
        if self.mode == "martingale":
            return float(threshold_above(scores, allowed))
        return float(value_threshold(scores, allowed, self.polarity))

    def _scores(self, group: str | None) -> NDArray[np.float32]:
        groups = self.groups or {}
        if group is not None and group not in groups:
            raise ValueError(
                f"`group` {group!r} was not calibrated, only {', '.join(groups) or 'all texts together'}."
            )
        return np.array(self.scores if group is None else groups[group], dtype=np.float32)

    def smallest_alpha(self, group: str | None = None) -> float | None:
        """The smallest promise that has a finite threshold, in steps of 0.0001; `None` if there is none at all."""
        steps = range(1, 10_000)
        first = bisect_left(steps, True, key=lambda step: math.isfinite(self.threshold(step / 10_000, group)))
        return steps[first] / 10_000 if first < len(steps) else None

    def promised_threshold(self, alpha: float) -> float:
        """[`threshold`], but never infinite.

        Raises:
            ValueError: if no finite threshold keeps the promise; says what can be promised.
        """
        threshold = self.threshold(alpha)
        if math.isinf(threshold):
            smallest = self.smallest_alpha()
            possible = "none at all" if smallest is None else f"at least {smallest}"
            raise ValueError(
                f"`alpha`={alpha} has no finite threshold: this calibration (mode {self.mode!r}, n={self.n}) can "
                f"promise {possible}. Raise `alpha`, or calibrate on more texts."
            )
        return threshold

    @property
    def curve(self) -> list[dict[str, float | None]]:
        """`alpha` and `threshold` over a grid of `alpha`; `None` where no finite threshold keeps the promise."""
        return self._curve(None)

    def _curve(self, group: str | None) -> list[dict[str, float | None]]:
        pairs = ((alpha, self.threshold(alpha, group)) for alpha in CURVE)
        return [{"alpha": alpha, "threshold": c if math.isfinite(c) else None} for alpha, c in pairs]

    def to_dict(self, scores: bool = True) -> dict[str, Any]:
        """The JSON form.

        Args:
            scores (`bool`): with the scores, without which it cannot be read back; leave them out for a report.
        """
        plain = ("mode", "method", "polarity", "n", "delta", "guarantee", "curve")
        provenance = ("head_fingerprint", "data", "sampling", "kernel", "backend")
        record = {"format": FORMAT} | {name: getattr(self, name) for name in plain + provenance}
        if self.groups:
            record["groups"] = {
                key: {"n": len(own), "curve": self._curve(key)} | ({"scores": list(own)} if scores else {})
                for key, own in self.groups.items()
            }
        if scores:
            record["scores"] = list(self.scores)
            record |= {"correct": list(self.correct)} if self.correct is not None else {}
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Calibration":
        """Read the JSON form.

        Raises:
            ValueError: for another format, for unknown or missing keys, and if thresholds do not follow from scores.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, Mapping) else type(record).__name__
            raise ValueError(f"the format is {found!r}, this version of hf-value-steer reads {FORMAT!r}.")
        given = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        if missing := [name for name in ("mode", "method", "polarity", "scores") if name not in given]:
            raise ValueError(f"{', '.join(missing)} is missing.")
        if "groups" in given:
            given["groups"] = {key: group["scores"] for key, group in given["groups"].items()}
        calibration = cls(**given)
        expected = calibration.to_dict() | {"guarantee": record.get("guarantee")}
        if wrong := sorted(key for key in {*expected, *record} if expected.get(key) != record.get(key)):
            raise ValueError(
                f"{', '.join(f'`{key}`' for key in wrong)} is unknown or does not follow from the scores."
            )
        return calibration

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `calibration.json` into a folder and return its path."""
        path = Path(folder) / FILE_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Calibration":
        """Read `calibration.json` from a folder.

        Raises:
            ArtefactError: if the file is corrupt or of an unknown format.
        """
        path = Path(folder) / FILE_NAME
        with reading(path, "calibration"):
            return cls.from_dict(read_object(path))
