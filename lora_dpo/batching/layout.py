"""Who attends to whom in a packed micro-batch.

Legend: `T` packed tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MERGED_TOKENS = 192
"""Short examples are attended to together, under one mask, up to this many tokens."""


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
