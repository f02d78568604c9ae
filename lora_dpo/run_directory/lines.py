"""Files of JSON lines that grow while they are made, and that the next process goes on with."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_dpo.errors import RunError


class GrowingFile:
    """One line an item, written when the item is done. Open it with `growing`."""

    def __init__(self, file: Path):
        self.file = file

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, its object) of what is there. Raises RunError for a line that is none.

        A last line without its end is what a kill, or a full disk, left: it is cut off.
        """
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            whole = 0
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                yield number, self._object(line, number)
        if whole < self.file.stat().st_size:
            os.truncate(self.file, whole)

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RunError(f"{self.file} line {number} is damaged: mend or remove it, or name another file")
        return found

    def append(self, line: Mapping[str, Any]) -> None:
        """One line more, whole or not at all. Raises RunError."""
        text = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            with self.file.open("ab", buffering=0) as out:
                end = out.tell()
                try:
                    if out.write(text) != len(text):  # a full disk may take a part
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(out.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        out.truncate(end)
                    raise
        except OSError as error:
            raise RunError(f"cannot write {self.file}: {error.strerror}") from error


@contextlib.contextmanager
def growing(file: Path) -> Iterator[GrowingFile]:
    """A file that nobody else writes meanwhile. Raises RunError if somebody does, or it can't be had."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise RunError(f"{file} is a folder: name a file")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is writing {file}") from None
    except (OSError, NotImplementedError) as error:
        raise RunError(f"cannot write {file}: {error}") from error
    try:
        yield GrowingFile(file)
    finally:
        # While it is still held: whoever opened it meanwhile finds that it is gone, and makes a new one.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()
