"""Norm-calibrated activation steering: vectors of the residual stream, their strength, and what carries them."""

from hf_value_steer.activation.apply import steered
from hf_value_steer.activation.interop import (
    vectors_from_file,
    vectors_from_gguf,
    vectors_from_repeng,
    vectors_from_steering_vectors,
)
from hf_value_steer.activation.norms import mean_norms, relative_influence
from hf_value_steer.activation.steering_vectors import SteeringVectors


__all__ = [
    "SteeringVectors",
    "mean_norms",
    "relative_influence",
    "steered",
    "vectors_from_file",
    "vectors_from_gguf",
    "vectors_from_repeng",
    "vectors_from_steering_vectors",
]
