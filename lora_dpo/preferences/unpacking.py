"""Gzip files, unpacked no further than data ever is: a few kilobytes can unpack to gigabytes of zeros."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any, cast

from lora_dpo.errors import DataError

HIGHEST_RATIO = 200
"""Text packs to a third or a tenth; gzip's own limit is 1032 to 1."""
UNSUSPICIOUS = 2**24
"""So many bytes (16 MiB) may come out of any file."""
_RANDOM_ACCESS = (".parquet.gz", ".arrow.gz")


def open_unpacked(path: Path) -> IO[bytes]:
    """The content of a gzip file.

    Reading raises DataError once it is more than 16 MiB and more than 200 times the file's size.
    """
    stream = cast("IO[bytes]", io.BufferedReader(_Bounded(path), 2**16))
    if not path.name.lower().endswith(_RANDOM_ACCESS):
        return stream
    with stream:
        return io.BytesIO(stream.read())  # moving back and forth in a gzip file would unpack it each time


class _Bounded(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = gzip.GzipFile(path)
        self._left = max(UNSUSPICIOUS, HIGHEST_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            ratio = f"more than {HIGHEST_RATIO} times its size"
            raise DataError(f"{self._path}: unpacks to {ratio}; if that is meant, gunzip it first")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
