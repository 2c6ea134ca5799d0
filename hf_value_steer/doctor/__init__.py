"""Whether steering is exact on one model and one machine: the checks behind `hf-value-steer doctor`."""

from hf_value_steer.doctor.checks import CHECKS, diagnose
from hf_value_steer.doctor.context import Check


__all__ = ["CHECKS", "Check", "diagnose"]
