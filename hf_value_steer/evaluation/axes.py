"""The axes of charts: where numbers lie on them, and at which round numbers there are ticks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis: its label, its ends, its ticks with their texts, and what makes a number a place on it."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str]
    warp: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """Where a number lies between the ends, in [0, 1]; what lies outside is put at the end."""
        low, high = self.warp(self.low), self.warp(self.high)
        return (self.warp(min(max(value, self.low), self.high)) - low) / (high - low)


def linear(
    label: str, values: Sequence[float], text: Callable[[float], str], start: float | None = None, tight: bool = False
) -> Axis:
    """An axis around `values` with round ticks; it ends at ticks, or just outside the values if it is `tight`."""
    low, high = min(values), max(values)
    high = high if high > low else low + (abs(low) or 1.0)
    step = _round_up((high - low) / 5)
    if tight:
        low, high = (low if start == low else low - 0.04 * (high - low)), high + 0.04 * (high - low)
        ticks = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        return Axis(label, low, high, ticks, text)
    ticks = [index * step for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return Axis(label, ticks[0], ticks[-1], ticks, text)


def logarithmic(label: str, values: Sequence[float], text: Callable[[float], str]) -> Axis:
    """A logarithmic axis with ticks at 1, 2 and 5 times the powers of ten, its ends just outside `values`."""
    low, high = min(values) / 1.15, max(values) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return Axis(label, low, high, [tick for tick in ticks if low <= tick <= high], text, math.log)


def odds(label: str, values: Sequence[float]) -> Axis:
    """An axis of values in (0, 1) by their log odds, so that 0.01 and 0.99 are as far from 0.5."""
    low, high = max(min(values), 1e-5) / 1.5, 1 - max(1 - max(values), 1e-5) / 1.5
    ticks = [tick for tick in (1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999) if low <= tick <= high]
    return Axis(label, low, high, ticks, lambda value: f"{value:.3g}", lambda value: math.log(value / (1 - value)))


def _round_up(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= step * (1 - 1e-9))
