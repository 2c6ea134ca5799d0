"""Norm-calibrated activation steering: vectors of the residual stream, their strength, and what carries them."""
