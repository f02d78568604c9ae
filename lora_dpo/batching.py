"""Branches → packed micro-batches, each shared prefix once, and which examples make up a step.

Legend: `T` packed tokens, `S` score rows, `N` sequences (an example's sides, one after another), `k` sides.

A score row is (hidden position, target token, side): the hidden state at the position before a scored token
predicts that token. The last shared position may serve several targets, one a side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_dpo.tokenization import Branches

Way = Literal["shared", "shared by mask", "packed", "packed by mask", "padded", "single"]
"""How a micro-batch runs through a model, from the cheapest to what is right for every causal decoder.

"shared": each prefix once, the layout as an argument of the forward call. "shared by mask": the same under an
explicit mask, for models that drop such arguments. "packed": every sequence whole, told apart by its
positions, "packed by mask" by a mask. "padded": every sequence is a row. "single": one sequence at a time.
"""

MERGED_TOKENS = 192
"""Short examples are attended to together, under one mask, up to this many tokens."""

DEFAULT_VALUES = {"weight": 1.0, "margin": 0.0}
"""What an example without this value has, beside examples that have it."""


@dataclass(frozen=True)
class Block:
    """One attention call: queries [start, stop) over the keys of `key_spans`; causal if positions say it
    all.

    back: the keys of two spans begin with a prefix that leads the block so many before this one.
    """

    start: int
    stop: int
    key_spans: tuple[tuple[int, int], ...]
    causal: bool
    back: int = 0


class BranchLayout:
    """How packed tokens branch: who may attend to whom.

    example, branch, position: int64 [T]; branch 0 is the shared prefix, 1…k the rests. A token sees those of
    its own example that are in the prefix or in its own rest, at its position or before it.
    """

    def __init__(self, example: Tensor, branch: Tensor, position: Tensor, lengths: Sequence[tuple[int, ...]]):
        self.example, self.branch, self.position = example, branch, position
        self.lengths = tuple(lengths)
        self._masks: dict[tuple[Block, int | None, int | None], Tensor] = {}

    def to(self, device: torch.device) -> BranchLayout:
        if self.example.device == device:
            return self
        moved = (sent(t, device) for t in (self.example, self.branch, self.position))
        return BranchLayout(*moved, lengths=self.lengths)

    @cached_property
    def separate_blocks(self) -> tuple[Block, ...]:
        """Blocks of each example by itself: [prefix + first rest] over itself, then every other rest."""
        starts = itertools.accumulate((sum(lengths) for lengths in self.lengths), initial=0)
        parts = (
            _branch_blocks(start, *lengths) for start, lengths in zip(starts, self.lengths, strict=False)
        )
        return tuple(block for blocks in parts for block in blocks)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """`separate_blocks`, but neighbouring short examples share one block with a mask: fewer, fuller
        calls.
        """
        blocks: list[Block] = []
        start = group = 0
        for n, lengths in enumerate(self.lengths):
            end = start + sum(lengths)
            last = n + 1 == len(self.lengths)
            if last or end + sum(self.lengths[n + 1]) - group > MERGED_TOKENS:
                if group == start:
                    blocks += _branch_blocks(start, *lengths)
                else:
                    blocks.append(Block(group, end, ((group, end),), causal=False))
                group = end
            start = end
        return tuple(blocks)

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """What a variable-length attention call takes, every branch a sequence with its prefix's keys
        before it.

        (index of the keys int64 [keys], cumulative query lengths, cumulative key lengths int32, longest of
        each)
        """
        device = self.example.device
        blocks = self.separate_blocks
        index = torch.cat([torch.arange(*span) for block in blocks for span in block.key_spans])
        queries = [block.stop - block.start for block in blocks]
        keys = [sum(stop - start for start, stop in block.key_spans) for block in blocks]
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys))
        return sent(index, device), sent(cu_q, device), sent(cu_k, device), max(queries), max(keys)

    @cached_property
    def sequences(self) -> tuple[Tensor, ...]:
        """Where each sequence's tokens lie, its prefix first: int64 [its length], an example's sides in
        order.
        """
        found, start = [], 0
        for prefix, *rests in self.lengths:
            rest_start = start + prefix
            for rest in rests:
                parts = torch.arange(start, start + prefix), torch.arange(rest_start, rest_start + rest)
                found.append(torch.cat(parts).to(self.example.device))
                rest_start += rest
            start = rest_start
        return tuple(found)

    def mask(self, block: Block, window: int | None, chunk: int | None = None) -> Tensor:
        """bool [queries, keys]: who may be seen. A window of W holds the token itself and the W − 1
        before; with chunks of C positions a token sees its own chunk only.
        """
        key = (block, window, chunk)
        if key not in self._masks:
            keys = torch.cat([torch.arange(*span, device=self.example.device) for span in block.key_spans])
            queries = slice(block.start, block.stop)
            distance = self.position[queries, None] - self.position[None, keys]
            seen = (self.example[queries, None] == self.example[None, keys]) & (distance >= 0)
            branch = self.branch[None, keys]
            seen &= (branch == 0) | (branch == self.branch[queries, None])
            if window is not None:
                seen &= distance < window
            if chunk is not None:
                seen &= self.position[queries, None] // chunk == self.position[None, keys] // chunk
            self._masks[key] = seen
        return self._masks[key]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on its way to a device. Pageable memory would wait for all that the card has still to do."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _branch_blocks(start: int, prefix: int, *rests: int) -> list[Block]:
    """The blocks of one example that lies at `start`."""
    end = start + prefix + rests[0]
    blocks = [Block(start, end, ((start, end),), causal=True)]
    for rest in rests[1:]:
        own = (end, end + rest)
        spans = ((start, start + prefix), own) if prefix else (own,)
        if rest:
            blocks.append(Block(*own, spans, causal=prefix == 0, back=len(blocks) if prefix else 0))
        end += rest
    return blocks


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
