"""A step's examples → few micro-batches, without padding where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lora_dpo.batching.microbatch import MicroBatch, collate, value_names
from lora_dpo.tokenization import Branches

Way = Literal["shared", "shared by mask", "packed", "packed by mask", "padded", "single"]
"""How a micro-batch runs through a model, from the cheapest to what is right for every causal decoder.

"shared": each prefix once, the layout as an argument of the forward call. "shared by mask": the same under an
explicit mask, for models that drop such arguments. "packed": every sequence whole, told apart by its
positions, "packed by mask" by a mask. "padded": every sequence is a row. "single": one sequence at a time.
"""


class Size(NamedTuple):
    """What examples cost: packed tokens, and rows × longest where every sequence is a row."""

    tokens: int = 0
    rows: int = 0
    longest: int = 0

    @classmethod
    def of(cls, item: Branches, way: Way) -> Size:
        lengths = [len(item.prefix) + len(rest) for rest in item.rests]
        tokens = item.tokens if way.startswith("shared") else sum(lengths)
        return cls(tokens, len(lengths), max(lengths))

    def with_(self, other: Size) -> Size:
        longest = max(self.longest, other.longest)
        return Size(self.tokens + other.tokens, self.rows + other.rows, longest)

    def cost(self, way: Way) -> int:
        return self.rows * self.longest if way == "padded" else self.tokens


def cost(branches: Sequence[Branches], way: Way = "shared") -> int:
    """How many tokens the model computes, padding included, when these run as one micro-batch this way."""
    total = Size()
    for item in branches:
        total = total.with_(Size.of(item, way))
    return total.cost(way)


def pack(
    branches: Sequence[Branches], tokens_per_microbatch: int, way: Way = "shared"
) -> Iterator[MicroBatch]:
    """A step's examples in few micro-batches that cost at most that many tokens (first fit, longest first).

    way: how they will run (`Model.way`). An example is the smallest unit: one that costs more than the
    budget gets a micro-batch of its own. Each is made when it is its turn, so that one is held at a time.
    """
    sizes = [Size.of(item, way) for item in branches]
    bins: list[tuple[Size, list[int]]] = []
    for example in sorted(range(len(branches)), key=lambda n: (-sizes[n].cost(way), n)):
        for n, (used, members) in enumerate(bins):
            together = used.with_(sizes[example])
            if together.cost(way) <= tokens_per_microbatch:
                bins[n] = (together, [*members, example])
                break
        else:
            bins.append((sizes[example], [example]))
    names = value_names(branches)
    return (collate([branches[n] for n in members], members, names) for _, members in bins)


def halved(budget: int, branches: Sequence[Branches], way: Way = "shared") -> int | None:
    """Half of what a micro-batch of these took at most, in tokens, but enough for the longest; None where
    each had one of its own already.
    """
    longest = max(cost([item], way) for item in branches)
    return None if budget <= longest else max(longest, min(budget, cost(branches, way)) // 2)
