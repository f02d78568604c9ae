"""The failing disk: compiled here, loaded before everything by the nursery, armed in a child."""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

from nursery import Flags

KILLED = -1
"""In place of an error's number: the process dies there."""


def compiled(folder: Path) -> Path | None:
    """The shared library, made in that folder; None where there is no C compiler, or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.uname().sysname != "Linux":
        return None
    library = folder / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-w", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def arm(flags: Flags, below: str, at: int, error: int = errno.ENOSPC, stays: bool = True) -> None:
    """Called in the child. below: the folder on the failing disk. at: which operation fails, 0 none."""
    library = ctypes.CDLL(None)
    library.disk_operations.restype = ctypes.c_long
    library.disk_fails(os.fsencode(below), ctypes.c_long(at), error, int(stays))

    def tell() -> None:
        flags["operations"] = library.disk_operations()

    atexit.register(tell)
    before = os._exit

    def leave(code: int) -> None:
        tell()
        before(code)

    os._exit = leave  # pyright: ignore[reportAttributeAccessIssue]
