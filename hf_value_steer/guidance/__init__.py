"""Stable value guidance (SVGT, arXiv 2605.11712): a value module beside the backbone, and bridge tokens made by it."""

from hf_value_steer.configuration.guidance_module import PRESETS, GuidanceModuleConfig
from hf_value_steer.guidance.module import GuidanceModule, GuidanceModuleOutput


__all__ = ["PRESETS", "GuidanceModule", "GuidanceModuleConfig", "GuidanceModuleOutput"]
