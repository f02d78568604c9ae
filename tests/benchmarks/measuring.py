"""What the benchmarks share in measuring: peak memory, the conditions of a run, tables and JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SAMPLE_SECONDS = 0.02


class PeakMemory:
    """The most memory in use inside the block, above what was in use at its start (or `above`), in bytes.

    CPU: anonymous memory of this process (files that safetensors maps cost nothing), sampled every 20 ms.
    CUDA: what torch's allocator handed out.
    """

    def __init__(self, device: torch.device, above: int | None = None):
        self.device, self.start = device, above
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        now = self._settle()
        self.start = now if self.start is None else self.start
        if self.device.type == "cpu":
            self._peak = now
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            self._done.set()
            self._thread.join()
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._peak
        self.bytes = peak - (self.start or 0)

    def _settle(self) -> int:
        """Give back what is free; the bytes in use then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        _return_free_memory()
        return anonymous_bytes()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the memory of a CPU run is read from /proc/self/status, which this system doesn't have")


def _return_free_memory() -> None:
    """What loading freed, but malloc kept, would hide as much growth: give it back first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def conditions() -> dict[str, Any]:
    """What a reader needs to judge a measurement: machine, threads, versions, and how busy it was."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "trl", "lora-dpo")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": cuda or "cpu",
        "load average": round(os.getloadavg()[0], 2),
        "versions": found,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def print_conditions(found: dict[str, Any]) -> None:
    print(
        f"\n{found['device']}: {found['processor']}, {found['cores']} cores, {found['threads']} threads,"
        f" load average {found['load average']} at the start"
    )
    print("  ".join(f"{name} {number}" for name, number in found["versions"].items()))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, as aligned columns; numbers with three digits."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    print()
    for line in cells:
        first, *others = (
            cell.ljust(w) if n == 0 else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(file: Path | None, content: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"\nwritten: {file}")
