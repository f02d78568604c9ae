"""Branches → one packed micro-batch, each shared prefix once.

Legend: `T` packed tokens, `S` score rows, `N` sequences (an example's sides, one after another), `k` sides.

A score row is (hidden position, target token, side): the hidden state at the position before a scored token
predicts that token. The last shared position may serve several targets, one a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lora_dpo.batching.layout import BranchLayout, sent
from lora_dpo.losses import DEFAULT_VALUES
from lora_dpo.tokenization import Branches


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Packed examples, `[prefix | rest_1 | … | rest_k]` one after another, without padding.

    token_ids, positions: int64 [T]. score_positions, targets, sequences: int64 [S]; row s scores token
    targets[s] after hidden state score_positions[s] for sequence sequences[s] of N = examples × sides.
    examples: which examples of the step these are. keys: `Branches.key` of each. rows: how many score rows
    each has; they lie one example after another. values: name → float64 [examples], for the names that any
    of the examples has that were packed together with these.
    """

    token_ids: Tensor
    positions: Tensor
    layout: BranchLayout
    score_positions: Tensor
    targets: Tensor
    sequences: Tensor
    examples: tuple[int, ...]
    sides: int
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        names = ("token_ids", "positions", "score_positions", "targets", "sequences")
        moved = {name: sent(getattr(self, name), device) for name in names}
        values = {name: sent(value, device) for name, value in self.values.items()}
        return replace(self, layout=self.layout.to(device), values=values, **moved)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums of score rows [S] by sequence: float64, or int64 for integers, [examples, sides].

        A float32 sum of −3,000 nats is off by 1e-4, as much as the step that a loss is to see.
        """
        values = values.double() if values.is_floating_point() else values
        sums = values.new_zeros(len(self.examples) * self.sides).index_add(0, self.sequences, values)
        return sums.view(len(self.examples), self.sides)

    def places(self) -> Tensor:
        """How many score rows of the same sequence stand before each: int64 [S]."""
        lengths = self.scored_lengths().flatten()
        starts = lengths.cumsum(0) - lengths
        return torch.arange(len(self.sequences), device=starts.device) - starts[self.sequences]

    def scored_lengths(self) -> Tensor:
        """How many tokens of each sequence are scored: int64 [examples, sides]."""
        return self.per_sequence(torch.ones_like(self.targets))


def collate(
    branches: Sequence[Branches], examples: Sequence[int], names: Sequence[str] | None = None
) -> MicroBatch:
    """One micro-batch of these examples, in this order; names: of its values, None for those they have."""
    ids, positions, example, branch, lengths = [], [], [], [], []
    score_positions, targets, sequences = [], [], []
    start = 0
    for n, item in enumerate(branches):
        prefix = len(item.prefix)
        parts = (item.prefix, *item.rests)
        ids += parts
        positions += [np.arange(prefix), *(np.arange(prefix, prefix + len(rest)) for rest in item.rests)]
        branch += [np.full(len(part), b) for b, part in enumerate(parts)]
        example.append(np.full(item.tokens, n))
        lengths.append(tuple(map(len, parts)))
        rest_start = start + prefix
        for side, rest in enumerate(item.rests):
            at = np.flatnonzero(item.scored[side])
            # Where token t of this side lies among the packed ones: in the prefix, or shifted into its rest.
            packed = np.where(at - 1 < prefix, start + at - 1, rest_start + at - 1 - prefix)
            score_positions.append(packed)
            targets.append(item.side(side)[at])
            sequences.append(np.full(len(at), n * item.sides + side))
            rest_start += len(rest)
        start += item.tokens
    tokens = [_int64(x) for x in (ids, positions, example, branch)]
    rows = [_int64(x) for x in (score_positions, targets, sequences)]
    layout = BranchLayout(tokens[2], tokens[3], tokens[1], lengths)
    return MicroBatch(
        token_ids=tokens[0],
        positions=tokens[1],
        layout=layout,
        score_positions=rows[0],
        targets=rows[1],
        sequences=rows[2],
        examples=tuple(examples),
        sides=branches[0].sides,
        keys=tuple(item.key for item in branches),
        rows=tuple(sum(map(item.scored_count, range(item.sides))) for item in branches),
        values=_values(branches, value_names(branches) if names is None else names),
    )


def value_names(branches: Sequence[Branches]) -> list[str]:
    """The names of values that any of these has."""
    return sorted({name for item in branches for name in item.values})


def _values(branches: Sequence[Branches], names: Sequence[str]) -> dict[str, Tensor]:
    """name → float64 [examples]."""
    rows = {name: [_value(item, name) for item in branches] for name in names}
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}


def _value(item: Branches, name: str) -> float:
    return item.values[name] if name in item.values else DEFAULT_VALUES[name]


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
