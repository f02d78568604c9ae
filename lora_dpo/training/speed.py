"""How fast a run is, how long it will take, and what it took of memory."""

from __future__ import annotations

import sys
import time

import psutil
import torch


class Speed:
    """Counts from the step where it was made. steps: how many the run will have."""

    def __init__(self, step: int, steps: int, device: torch.device):
        self._first, self._steps, self._device = step, steps, device
        self._began = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def metrics(self, step: int, *, tokens: float, examples: int, began: float) -> dict[str, float]:
        """Of a step that began at a time of time.monotonic(); `step` steps are done with it."""
        seconds = max(time.monotonic() - began, 1e-9)
        return {
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": examples / seconds,
            "peak_memory_gib": peak_memory_gib(self._device),
            "seconds": seconds,
            "seconds_left": self.seconds / (step - self._first) * (self._steps - step),
        }


def peak_memory_gib(device: torch.device) -> float:
    """CUDA: the most that tensors took so far. CPU: the most that the process had resident so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
