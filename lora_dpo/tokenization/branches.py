"""The one shape that reaches the model: `[prefix | rest_1 | … | rest_k]`.

Legend: `P` prefix tokens, `R_i` tokens of rest i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from lora_dpo.preferences import Where

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Branches:
    """The sides of one record with what they share in front stored once.

    prefix: int32 [P]; may reach into the responses. rests: int32 [R_i] each, may be empty (one side always
    has an empty rest). scored: bool [P + R_i] each, which tokens of side i enter its log-prob; all sides
    agree on [:P], and index 0 is never scored, because nothing predicts it. values: the record's numbers by
    name, such as its weight; they say nothing of the tokens, and so aren't part of `key`.
    """

    prefix: Ids
    rests: tuple[Ids, ...]
    scored: tuple[Mask, ...]
    where: Where
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def sides(self) -> int:
        return len(self.rests)

    @property
    def tokens(self) -> int:
        """P + ΣR_i, what the record costs in a packed micro-batch."""
        return len(self.prefix) + sum(len(rest) for rest in self.rests)

    def side(self, index: int) -> Ids:
        """Side `index` alone, as the whole conversation was tokenized: int32 [P + R_i]."""
        return np.concatenate([self.prefix, self.rests[index]])

    @property
    def prompt_ids(self) -> Ids:
        """What stands before the first scored token of side 0: int32 [tokens], at least one; the whole side
        where nothing of it is scored.
        """
        first = int(self.scored[0].argmax())
        return self.side(0)[:first] if first else self.side(0)

    def only(self, sides: Sequence[int]) -> Branches:
        """These sides alone."""
        rests, scored = (tuple(parts[n] for n in sides) for parts in (self.rests, self.scored))
        return replace(self, rests=rests, scored=scored)

    def scored_count(self, index: int) -> int:
        return int(self.scored[index].sum())

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name this example wherever it comes from: a hash of token ids, boundaries and masks.

        Template and truncation act through those alone.
        """
        digest = xxhash.xxh3_128(np.array([len(self.prefix), *map(len, self.rests)], dtype="<i8").tobytes())
        for part in (self.prefix, *self.rests, *self.scored):
            digest.update(part.tobytes())
        return digest.digest()


def share(
    sides: Sequence[ArrayLike],
    scored: Sequence[ArrayLike],
    where: Where,
    values: Mapping[str, float] | None = None,
) -> Branches:
    """Store the longest common token prefix of `sides` (integers [P + R_i]) once.

    It is cut where the masks `scored` (bool [P + R_i]) differ, so sharing never changes what is scored.
    Raises ValueError if there is no side, a side is empty, or a mask has another length than its side.
    """
    ids = [np.asarray(side, dtype=np.int32) for side in sides]
    masks = [np.array(mask, dtype=np.bool_) for mask in scored]
    if not ids or any(len(side) == 0 for side in ids):
        raise ValueError(f"{where}: there is no side, or a side without tokens")
    if [len(side) for side in ids] != [len(mask) for mask in masks]:
        raise ValueError(f"{where}: sides and their masks differ in length")
    for mask in masks:
        mask[0] = False
    common = min(_agreement(ids[0], masks[0], *other) for other in zip(ids, masks, strict=True))
    rests = tuple(side[common:].copy() for side in ids)
    return Branches(ids[0][:common].copy(), rests, tuple(masks), where, values or {})


def _agreement(ids: Ids, mask: Mask, other_ids: Ids, other_mask: Mask) -> int:
    """How many tokens two sides have in common in front, the same ones scored."""
    length = min(len(ids), len(other_ids))
    differ = (ids[:length] != other_ids[:length]) | (mask[:length] != other_mask[:length])
    return int(differ.argmax()) if differ.any() else length
