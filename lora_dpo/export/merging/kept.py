"""How much of an update survives being stored.

Legend: W what the base multiplies with, Δ the adapter's update, T = W + Δ what is wanted, S what is stored.

    kept  = ⟨S − W, Δ⟩ / ⟨Δ, Δ⟩     1 where S = T, 0 where rounding gave W back
    error = ‖S − T‖ / ‖Δ‖           what rounding put in beside it, in units of the update
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Kept:
    """Sums over the values of a tensor: ‖W‖², ‖Δ‖², ⟨S − W, Δ⟩, ‖S − T‖²."""

    weight: float = 0.0
    update: float = 0.0
    along: float = 0.0
    beside: float = 0.0

    def add(self, weight: Tensor, wanted: Tensor, stored: Tensor) -> None:
        """W, T and S of some values, float32, of one shape."""
        weight, wanted, stored = weight.reshape(-1), wanted.reshape(-1), stored.reshape(-1)
        update, gone = wanted - weight, stored - wanted
        self.weight += float(torch.dot(weight, weight))
        self.update += float(torch.dot(update, update))
        self.along += float(torch.dot(stored - weight, update))
        self.beside += float(torch.dot(gone, gone))

    @property
    def kept(self) -> float | None:
        """None of an update that is nothing."""
        return self.along / self.update if self.update else None

    @property
    def error(self) -> float:
        return (self.beside / self.update) ** 0.5 if self.update else 0.0

    @property
    def size(self) -> float:
        """‖Δ‖ / ‖W‖."""
        return (self.update / self.weight) ** 0.5 if self.weight else float(self.update > 0)


def joined(parts: Iterable[Kept]) -> Kept:
    """The sums over several tensors."""
    whole = Kept()
    for part in parts:
        for field in fields(Kept):
            setattr(whole, field.name, getattr(whole, field.name) + getattr(part, field.name))
    return whole
