"""Bounds that a number in a recipe, or in an objective, must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AtLeast:
    """A bound for a number: value ≥ low, or > low with `exclusive`, and ≤ high where one is given."""

    low: float
    high: float = math.inf
    exclusive: bool = False

    def accepts(self, value: float) -> bool:
        above = value > self.low if self.exclusive else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'greater than' if self.exclusive else 'at least'} {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"
