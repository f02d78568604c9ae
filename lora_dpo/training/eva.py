"""EVA: A starts from the main directions of what its layer is given (Paischer et al. 2024, arXiv:2410.07170).

Legend: `T` packed tokens, `I` inputs of a layer, `r` rank.

The rows of A become the first r right singular vectors of the layer's inputs [T, I] over some micro-batches
of the training data, as the base computes them; B stays 0, so that nothing is added in the beginning. Every
layer keeps its rank: that is the paper's ρ = 1, without redistribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lora_dpo.batching import pack
from lora_dpo.model import Model
from lora_dpo.model.initial import principal
from lora_dpo.reference import reference_logprobs
from lora_dpo.tokenization import Branches

EXAMPLES = 512
"""At most so many examples are looked at, spread evenly over the data."""

AGREEMENT = 0.99
"""A layer's directions have settled when each has this cosine with what it was one micro-batch before."""

BESIDE = 8
"""So many directions more than the rank are followed from one micro-batch to the next."""


def start_from_data(
    model: Model, branches: Sequence[Branches], *, tokens_per_microbatch: int, seed: int = 0
) -> int:
    """Set every A of a fresh adapter to its layer's directions; returns how many micro-batches that took."""
    layers = [layer for layer in model.adapter_layers if "default" in getattr(layer, "lora_A", ())]
    few = list(branches[:: max(1, len(branches) // EXAMPLES)])[:EXAMPLES]
    torch.manual_seed(seed)
    count = 0
    with _watched(layers) as watched:
        for batch in pack(few, tokens_per_microbatch, model.way):
            reference_logprobs(model, batch.to(model.device))
            count += 1
            if all(watch.directions.settled for watch in watched):
                break
    for layer, watch in zip(layers, watched, strict=True):
        a = layer.lora_A["default"].weight
        found = watch.directions.strong()[: len(a)]
        # What the data don't reach keeps its usual start: a row of zeros beside B = 0 would stay so.
        a.data[: len(found)] = normalize(found, dim=1).to(a)
    return count


@contextmanager
def _watched(layers: Sequence[Any]) -> Iterator[list[_Watch]]:
    """What each layer is given, followed while the context lasts."""
    previous = _Previous()
    watched = [_Watch(layer.r["default"], previous) for layer in layers]
    handles = [layer.register_forward_pre_hook(watch) for layer, watch in zip(layers, watched, strict=True)]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()
        previous.x = None


class _Previous:
    """The tensor that a layer was given last, and who followed it: the next layer may be given the same."""

    x: Tensor | None = None
    directions: _Directions | None = None


class _Watch:
    """A layer's hook. Layers that are given the same tensor share their directions."""

    def __init__(self, rank: int, previous: _Previous):
        self.rank, self.previous = rank, previous
        self.directions = _Directions(rank)

    def __call__(self, layer: Any, arguments: tuple[Any, ...]) -> None:
        x, previous = arguments[0], self.previous
        if x is previous.x and previous.directions is not None and previous.directions.rank >= self.rank:
            self.directions = previous.directions
            return
        self.directions.add(x)
        previous.x, previous.directions = x, self.directions


class _Directions:
    """The largest right singular vectors of all rows so far [k, I], each times its singular value."""

    def __init__(self, rank: int):
        self.rank, self.settled = rank, False
        self.rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: [..., I], any number of further rows."""
        with torch.autocast(x.device.type, enabled=False):
            new = x.detach().reshape(-1, x.shape[-1]).float()
            rows = new if self.rows is None else torch.cat([self.rows, new])
            count = min(self.rank + BESIDE, *rows.shape)
            _, values, vectors = principal(rows, count, iterations=4)
            before, self.rows = self.rows, values[:, None] * vectors
        if before is not None:
            most = min(self.rank, len(before), len(self.rows))
            same = cosine_similarity(before[:most], self.rows[:most]).abs()
            self.settled = bool((same >= AGREEMENT).all())

    def strong(self) -> Tensor:
        """The directions that the data do reach."""
        if self.rows is None:
            return torch.empty(0)
        norms = self.rows.norm(dim=1)
        return self.rows[norms > 1e-5 * norms.max()]
