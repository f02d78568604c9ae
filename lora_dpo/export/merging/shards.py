"""safetensors files, read by rows and written as they come.

`safe_open` maps whole files, whose pages count as memory of the process, and there is no writer that doesn't
hold all tensors. Here a tensor's rows are read into memory of their own, and a file is written in one pass:
its header is known before the first value is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

import torch
from torch import Tensor

from lora_dpo.errors import ModelError
from lora_dpo.model.stored import Stored, read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK_VALUES = 2**17
"""So many values of a tensor are computed at a time: what stays in a CPU's cache."""

THREADS = 4
"""At most so many tensors are made at a time: each takes memory."""

SYNC_BYTES = 2**27
"""After so many bytes the disk is asked to write what it has."""


class Tensors:
    """Tensors in safetensors files, read by rows, from any thread; a context that closes them."""

    def __init__(self, files: Iterable[Path]):
        """Raises ModelError where a file can't be read, or two hold a tensor of one name."""
        self.files = list(files)
        self.entries: dict[str, Stored] = {}
        for file in self.files:
            for entry in read_header(file):
                if entry.name in self.entries:
                    raise ModelError(f"{entry.name} is in {file} and in {self.entries[entry.name].file}")
                if entry.dtype not in DTYPES:
                    raise ModelError(f"{file}: {entry.name} holds {entry.dtype}, which is not exported")
                self.entries[entry.name] = entry
        self._open: dict[Path, IO[bytes]] = {}
        self._lock = Lock()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._open.values():
            handle.close()
        self._open.clear()

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """`count` rows of a tensor from `first` on, all by default, in memory of their own."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row = entry.size // max(1, rows)
        count = max(0, min(rows - first, rows if count is None else count))
        raw = self._bytes(entry, entry.start + first * row, count * row).view(self.dtype(name))
        return raw.reshape(count, *entry.shape[1:]) if entry.shape else raw.reshape(())

    def _bytes(self, entry: Stored, start: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        room = _bytes_of(raw)
        with self._lock:
            if entry.file not in self._open:
                self._open[entry.file] = entry.file.open("rb", buffering=0)
            handle = self._open[entry.file]
            handle.seek(start)
            while room:
                got: int = handle.readinto(room)  # pyright: ignore[reportAttributeAccessIssue]
                if not got:
                    raise ModelError(f"{entry.file} ended before its tensors did: it was changed meanwhile")
                room = room[got:]
        return raw


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes on the CPU; its own memory, where that is contiguous."""
    values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def blocks_of_rows(shape: Sequence[int], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of blocks of about `BLOCK_VALUES` values. multiple: of so many rows."""
    rows, row = shape[0], max(1, math.prod(shape[1:]))
    step = max(multiple, BLOCK_VALUES // row // multiple * multiple)
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor to write: its values come as blocks, of any shape, in the order of its elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(parts: Sequence[Part], shard_size: int) -> list[list[Part]]:
    """The parts in their order, divided among files of at most `shard_size` bytes, or of one tensor."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.size > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.size
    return shards


def write_shard(file: Path, parts: Sequence[Part], progress: Callable[[int], None] | None = None) -> None:
    """Write a safetensors file, its tensors as they come, and sync it. `progress` is told the bytes.

    Several tensors are made at once, each in a thread. Larger items come first in the file, so that every
    tensor is aligned. Raises OSError, and whatever the blocks raise.
    """
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        offsets = [end, end := end + part.size]
        header[part.name] = {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        _Writing(out, 8 + len(text), progress).all(parts)
        os.fsync(out.fileno())


class _Writing:
    """Tensors written by several threads, each to its place in one file."""

    def __init__(self, out: IO[bytes], start: int, progress: Callable[[int], None] | None):
        self.out, self.start, self.progress = out, start, progress
        self.lock, self.stop, self.unsynced = Lock(), Event(), 0

    def all(self, parts: Sequence[Part]) -> None:
        places = accumulate((part.size for part in parts), initial=self.start)
        threads = torch.get_num_threads()
        # A thread for each tensor, none inside: small operations wait for each other less.
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(THREADS, threads)) as pool:
                try:
                    work = [pool.submit(self._write, *task) for task in zip(parts, places, strict=False)]
                    for done in as_completed(work):
                        done.result()
                except BaseException:
                    self.stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)

    def _write(self, part: Part, place: int) -> None:
        end = place + part.size
        for block in part.blocks():
            if self.stop.is_set():
                return
            assert block.dtype == part.dtype, part.name
            content = _bytes_of(block)
            with self.lock:
                self.out.seek(place)
                _write_all(self.out, content)
                self.unsynced += len(content)
                sync, self.unsynced = (True, 0) if self.unsynced > SYNC_BYTES else (False, self.unsynced)
                if self.progress is not None:
                    self.progress(len(content))
            if sync:  # the disk works while the next blocks are computed
                os.fsync(self.out.fileno())
            place += len(content)
        assert place == end, part.name


def _write_all(out: IO[bytes], content: memoryview) -> None:
    while content:  # a full disk may take a part
        content = content[out.write(content) :]
