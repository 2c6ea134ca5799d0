"""Thresholds from data: what is promised about them, the numbers behind the promise, and `calibration.json`."""

from hf_value_steer.calibration.abstention import implied_reward, selective_threshold
from hf_value_steer.calibration.artefact import Calibration
from hf_value_steer.calibration.filtering import one_per_prompt


__all__ = ["Calibration", "implied_reward", "one_per_prompt", "selective_threshold"]
