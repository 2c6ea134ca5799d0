"""Whether steering is exact on one model and one machine: the checks behind `hf-value-steer doctor`."""

from hf_value_steer.doctor.checks import CHECKS, Check, diagnose


__all__ = ["CHECKS", "Check", "diagnose"]
