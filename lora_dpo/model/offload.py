"""Checkpointed activations in pinned host memory, copied on a stream of their own while the card computes.

With one layer checkpointed after another, what stays in memory is each layer's input, [T, D] in the compute
dtype: 32 layers of 4096 at 8192 tokens are 2 GiB. Here each goes to the host as soon as its layer has
begun, and comes back in the backward pass one layer before it is wanted.
"""

from __future__ import annotations

from collections import deque
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
    on, None on the CPU, where this only makes copies. smallest: bytes from which on a floating-point tensor
    is offloaded.
    """

    def __init__(self, stream: torch.cuda.Stream | None, smallest: int = OFFLOADED_BYTES):
        self._smallest = smallest
        self._stream = stream
        self._kept: list[_Kept | None] = []
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def saving(self) -> AbstractContextManager[Any]:
        # A checkpointed layer saves its input under these hooks, and all within it under checkpoint's own.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | int:
        parameter = isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point()
        if parameter or tensor.nbytes < self._smallest:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copied = None
        if self._stream is None:
            host.copy_(tensor)
        else:
            # Its producer has only been queued: the copy waits for it.
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
                copied = self._stream.record_event()
            self._let_go(tensor, copied)
        self._kept.append(_Kept(host, tensor.device, copied))
        return len(self._kept) - 1

    def _let_go(self, tensor: Tensor, copied: Any) -> None:
        """Hold a tensor until the compute stream has waited for its copy, two layers on: by then it is done.

        So its memory is used again in that stream's order. `record_stream` would wait for the host to notice,
        which runs layers ahead.
        """
        self._leaving.append((tensor, copied))
        if len(self._leaving) > 2:
            oldest, event = self._leaving.popleft()
            torch.cuda.current_stream(oldest.device).wait_event(event)

    def _unpack(self, saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        while self._leaving:
            last, event = self._leaving.popleft()
            torch.cuda.current_stream(last.device).wait_event(event)
        kept = self._fetch(saved)
        assert kept is not None and kept.back is not None, "a backward pass ran twice over one forward pass"
        if self._stream is not None:
            torch.cuda.current_stream(kept.device).wait_stream(self._stream)
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
        # The compute stream's memory, so that it is used again in that stream's order.
        kept.back = torch.empty_like(kept.host, device=kept.device, pin_memory=False)
        if self._stream is None:
            kept.back.copy_(kept.host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(kept.device))
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(kept.copied)
                kept.back.copy_(kept.host, non_blocking=True)
        return kept
