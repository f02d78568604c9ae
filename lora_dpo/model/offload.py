"""Checkpointed activations in pinned host memory, copied on a stream of their own while the card computes.

With one layer checkpointed after another, what stays in memory is each layer's input, [T, D] in the compute
dtype: 32 layers of 4096 at 8192 tokens are 2 GiB. Here each goes to the host as soon as its layer has
begun, and
comes back in the backward pass one layer before it is wanted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: a copy would cost more than it saves."""


@dataclass(eq=False)
class _Kept:
    """A saved tensor: on the host, and from shortly before it is wanted on its device again."""

    host: Tensor
    device: torch.device
    copied: Any
    back: Tensor | None = None


class OffloadedActivations:
    """The tensors of one forward pass that the backward pass wants, kept on the host meanwhile.

    Use as `with activations.saving(): forward()`; backward may run later, outside. stream: the one to copy
    on, None
    on the CPU, where this only makes copies. smallest: bytes from which on a floating-point tensor is
    offloaded.
    """

    def __init__(self, stream: torch.cuda.Stream | None, smallest: int = OFFLOADED_BYTES):
        self._smallest = smallest
        self._stream = stream
        self._kept: list[_Kept | None] = []

    def saving(self) -> AbstractContextManager[Any]:
        # A checkpointed layer saves its input under these hooks, and all within it under checkpoint's own.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | int:
        parameter = isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point()
        if parameter or tensor.nbytes < self._smallest:
            return tensor
        pinned = tensor.is_cuda
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        if self._stream is None:
            host.copy_(tensor)
            copied = None
        else:
            # Its producer has only been queued: the copy waits for it, and memory is reused after the copy.
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
                copied = self._stream.record_event()
            tensor.record_stream(self._stream)
        self._kept.append(_Kept(host, tensor.device, copied))
        return len(self._kept) - 1

    def _unpack(self, saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        kept = self._fetch(saved)
        assert kept is not None and kept.back is not None, "a backward pass ran twice over one forward pass"
        if self._stream is not None:
            current = torch.cuda.current_stream(kept.device)
            current.wait_stream(self._stream)
            kept.back.record_stream(current)
        self._kept[saved] = None
        # Queued behind what is wanted now, so that it arrives while this layer computes.
        if saved > 0:
            self._fetch(saved - 1)
        return kept.back

    def _fetch(self, index: int) -> _Kept | None:
        """Begin to copy one back, unless that has begun or it is done with."""
        kept = self._kept[index]
        if kept is None or kept.back is not None:
            return kept
        if self._stream is None:
            kept.back = kept.host.to(kept.device)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(kept.copied)
                kept.back = kept.host.to(kept.device, non_blocking=True)
        return kept
