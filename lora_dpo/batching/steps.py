"""Which examples make up a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class StepSampler:
    """Which examples make up a step: a function of (seed, step), so that resuming needs a number, not a
    replay.

    Every epoch is a fresh permutation of all examples; a step may reach over the end of one into the next.
    """

    examples: int
    per_step: int
    seed: int

    def steps(self, epochs: float) -> int:
        return max(1, math.ceil(self.examples * epochs / self.per_step))

    def step(self, step: int) -> list[int]:
        """The examples of the 0-based step."""
        first = step * self.per_step
        return [self._at(place) for place in range(first, first + self.per_step)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.examples)
        return int(_order(self.seed, epoch, self.examples)[offset])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch, int64 [examples]."""
    return np.random.default_rng((seed, epoch)).permutation(examples)
