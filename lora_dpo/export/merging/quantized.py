"""Quantized weights by rows: what a layer of the quantized base multiplies with, a few rows at a time.

Legend: `O` outputs, `I` inputs of a linear layer, `N` = O · I values, `B` blocks of 64 of them.

bitsandbytes rounds to 16 values a block by bisection, at some 80 million values a second. Here the same
codes come from comparisons in a CPU's cache, several times faster; each weight's first values are given to
bitsandbytes too, and where it disagrees it does them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import torch
from torch import Tensor

from lora_dpo.errors import ModelError

BLOCK = 64
"""Values that share a scale when a base is quantized as it loads."""

CHUNK = 2**17
"""Values that are quantized at a time."""


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight in 4 bits. packed uint8 [N / 2]; scales float32 [B]; dtype: what it is dequantized to."""

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]
    kind: str
    block: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, kind: str, *, double: bool) -> FourBit:
        """Quantize a weight [O, I] as the base does when it loads; `double` rounds the scales too."""
        encode = _encoder(weight, kind)
        parts = [encode(part) for part in weight.reshape(-1).split(CHUNK)]
        packed, scales = (torch.cat(column) for column in zip(*parts, strict=True))
        if double:
            offset = scales.mean()
            rounded, state = functional.quantize_blockwise(scales - offset, blocksize=256)
            scales = functional.dequantize_blockwise(rounded, state) + offset
        return cls(packed, scales, (weight.shape[0], weight.shape[1]), kind, BLOCK, weight.dtype)

    @classmethod
    def stored(cls, packed: Tensor, beside: Mapping[str, Tensor], dtype: torch.dtype) -> FourBit:
        """One from a quantized checkpoint. beside: what it keeps for this weight, by the ends of names."""
        state: Any = functional.QuantState.from_dict(dict(beside), device=packed.device)
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if len(state.shape) != 2:
            raise ModelError(f"a quantized weight of the base has the shape {list(state.shape)}")
        rows, columns = state.shape
        flat = packed.reshape(-1).view(torch.uint8)
        return cls(flat, scales.float(), (rows, columns), state.quant_type, state.blocksize, dtype)

    @property
    def step(self) -> int:
        """Rows come in multiples of this: all at once where a block of scales goes on in the next row.

        On a CPU bitsandbytes gives some such weights the scales of other blocks, by the number of their rows;
        what the base computes with is what it gives for all of them.
        """
        return self.shape[0] if self.shape[1] % self.block else 1

    def rows(self, first: int, count: int) -> Tensor:
        """Rows as the layer computes with them, in `dtype`. first: a multiple of `step`."""
        columns = self.shape[1]
        start, end = first * columns, (first + count) * columns
        state = functional.QuantState(
            absmax=self.scales[start // self.block : -(-end // self.block)],
            shape=torch.Size((count, columns)),
            dtype=self.dtype,
            blocksize=self.block,
            quant_type=self.kind,
        )
        return functional.dequantize_4bit(self.packed[start // 2 : -(-end // 2), None], state)


@dataclass(frozen=True, eq=False)
class EightBit:
    """A weight in 8 bits. values int8 [O, I]; scales float32 [O], one a row."""

    values: Tensor
    scales: Tensor
    step: int = 1

    @classmethod
    def of(cls, weight: Tensor) -> EightBit:
        made: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False)
        made = made.to(weight.device)
        return cls(made.data, made.SCB)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, first: int, count: int) -> Tensor:
        here = slice(first, first + count)
        return functional.int8_vectorwise_dequant(self.values[here], self.scales[here])


def _encoder(weight: Tensor, kind: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """(values) → (packed, scales), by comparisons where that is what bitsandbytes does."""

    def plain(values: Tensor) -> tuple[Tensor, Tensor]:
        packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type=kind)
        return packed.reshape(-1), state.absmax

    if kind != "nf4" or weight.device.type != "cpu":
        return plain
    code = functional.get_4bit_type("nf4", device="cpu")
    bounds = [float(bound) for bound in (code[1:] + code[:-1]) / 2]

    def quick(values: Tensor) -> tuple[Tensor, Tensor]:
        if values.numel() % (2 * BLOCK):
            return plain(values)
        blocks = values.float().view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).view(-1)
        codes = torch.zeros(scaled.shape, dtype=torch.uint8)
        above = torch.empty(scaled.shape, dtype=torch.bool)
        for bound in bounds:
            codes += torch.gt(scaled, bound, out=above).view(torch.uint8)
        pairs = codes.view(torch.int16)  # the first of two in the low byte
        return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), scales

    first = weight.reshape(-1)[:CHUNK]
    same = all(torch.equal(a, b) for a, b in zip(quick(first), plain(first), strict=True))
    return quick if same else plain
