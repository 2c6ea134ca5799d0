"""Stable value guidance (SVGT, arXiv 2605.11712): a value module beside the backbone, and bridge tokens made by it."""

from hf_value_steer.svgt.configuration import PRESETS, ValueGuidanceConfig
from hf_value_steer.svgt.module import ValueGuidanceModule, ValueGuidanceOutput


__all__ = ["PRESETS", "ValueGuidanceConfig", "ValueGuidanceModule", "ValueGuidanceOutput"]
