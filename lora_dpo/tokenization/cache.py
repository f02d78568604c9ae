"""What was tokenized before, by content: one safetensors file for each set of records.

The name is a hash of all that decides the result (`portable.corpus_key`), and a file is read only if its
bytes are those that were written. So nothing here can fail a run or change its data: what is missing,
damaged or cannot be written is tokenized anew.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from lora_dpo.preferences import Where
from lora_dpo.tokenization.flat import from_bytes, to_bytes
from lora_dpo.tokenization.outcomes import Tokenized

MOST_FILES = 20
MOST_BYTES = 2 * 2**30
"""The folder is kept within both: what was used longest ago goes first, the newest file stays."""

_LITTER_SECONDS = 24 * 3600


class TokenCache:
    """The folder with tokenized records. It need not exist, nor be writable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Tokenized | None:
        """What was tokenized under this key; None if that isn't there, or no longer as it was written."""
        file = self._file(key)
        try:
            branches, facts = from_bytes(file.read_bytes())
            if facts["key"] != key:
                return None
        except (OSError, ValueError, LookupError, TypeError, MemoryError):
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        dropped = Counter({reason: count for reason, count, _ in facts["dropped"]})
        return Tokenized(branches, dropped, {r: Where(*place) for r, _, place in facts["dropped"]}, True)

    def write(self, key: str, tokenized: Tokenized) -> None:
        """Keep it, by one rename. A full disk or a folder that can't be written is passed over."""
        first = tokenized.first_dropped
        dropped = [
            (reason, count, [first[reason].file, first[reason].row])
            for reason, count in tokenized.dropped.items()
        ]
        with contextlib.suppress(OSError, SafetensorError, MemoryError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._put(self._file(key), to_bytes(tokenized.branches, {"key": key, "dropped": dropped}))
            self._clear()

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Waits while another process (of this run, or another) does this key; a dead one isn't in the way.

        Where the file system has no locks nobody waits, and each does the work.
        """
        lock = FileLock(self._folder / f"{key}.lock")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError):
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _put(self, file: Path, data: bytes) -> None:
        # A name of its own: where locks don't work two processes may write the same key.
        handle, part = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".part")
        try:
            with open(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    def _clear(self) -> None:
        """Delete what is more than the folder may hold, and what killed processes left."""
        files = [(file.stat(), file) for file in self._folder.glob("*.safetensors")]
        size = 0
        for place, (stat, file) in enumerate(sorted(files, key=lambda item: -item[0].st_mtime_ns)):
            size += stat.st_size
            if place and (place >= MOST_FILES or size > MOST_BYTES):
                file.unlink(missing_ok=True)
        for file in [*self._folder.glob(".*.part"), *self._folder.glob("*.lock")]:
            if time.time() - file.stat().st_mtime > _LITTER_SECONDS:
                file.unlink(missing_ok=True)
