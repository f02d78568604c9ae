"""On the CPU, keep what malloc holds for reuse within what one micro-batch took.

Micro-batches differ in shape, and malloc keeps the holes of each: over a long run they add up. Giving all
back after each costs one page fault for every 4 KiB that the next one touches, up to a twentieth of the
time. A card's allocator reuses its blocks by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

import torch

SLACK = 1.02
"""Memory may stay this much above what a micro-batch needed that began with nothing held."""


class Heap:
    """What the process holds after each micro-batch, against what one needs by itself.

    resident: bytes the process holds now. trim: gives the system what was freed.
    """

    def __init__(self, resident: Callable[[], int], trim: Callable[[], object]):
        self._resident, self._trim = resident, trim
        self._needed = 0
        self._began_empty = False

    def after_microbatch(self) -> None:
        """Give back what was freed, if holes make it more than a micro-batch needs."""
        held = self._resident()
        if self._began_empty:
            self._needed = max(self._needed, held)
        self._began_empty = held > SLACK * self._needed
        if self._began_empty:
            self._trim()


def give_back_freed(device: torch.device) -> None:
    """After a micro-batch: see `Heap`. Systems other than Linux give memory back by themselves."""
    if device.type == "cpu" and _HEAP is not None:
        _HEAP.after_microbatch()


def _heap() -> Heap | None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is None:  # not glibc
        return None
    return Heap(_resident, lambda: trim(0))


def _resident() -> int:
    """Anonymous memory of this process in RAM, bytes."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


_HEAP = _heap()
