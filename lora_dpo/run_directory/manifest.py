"""Whether a folder is what was written: every file's size and SHA-256, in one file.

The manifest is a function of the other files, down to its last byte. So it is checked by making it again and
comparing: no change of it, and none of what it tells, goes unseen. Names in it are never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**24
"""Bytes; a larger file of that name is none."""


def manifest_of(folder: Path) -> bytes:
    """What the manifest of a folder must be, as it is now. Raises OSError; ValueError where something in it
    is neither a file nor a folder of files.
    """
    names = sorted(_files(folder, ""))
    return _text({name: _size_and_hash(folder / name) for name in names if name != MANIFEST})


def damage(folder: Path, *, more: bool = False) -> str | None:
    """What is wrong with a folder that has a manifest; None if every file is what the manifest says.

    more: whether files that the manifest doesn't know may lie there too, such as somebody's notes.
    """
    try:
        file = folder / MANIFEST
        if not stat.S_ISREG(file.lstat().st_mode) or file.lstat().st_size > LARGEST_MANIFEST:
            return f"its {MANIFEST} is none"
        told, found = file.read_bytes(), manifest_of(folder)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None if told == found else _difference(told, found, more)


def _difference(told: bytes, found: bytes, more: bool) -> str | None:
    """In words, for a person; that there is one is known. None if it is only what may lie there too."""
    now = json.loads(found)["files"]
    try:
        then = json.loads(told)["files"]
        if more:
            now = {name: now[name] for name in now.keys() & then.keys()}
            if told == _text(now):
                return None
        missing, extra = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
        changed = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    parts = [
        f"{_listed(names)} {what}"
        for names, what in ((missing, "missing"), (changed, "changed"), (extra, "not in its manifest"))
        if names
    ]
    return "; ".join(parts) or f"its {MANIFEST} is damaged"


def _listed(names: list[str]) -> str:
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{rest} {'is' if len(names) == 1 else 'are'}"


def _files(folder: Path, prefix: str) -> Iterator[str]:
    """The names of all files below, with slashes. Empty folders and links would be in no manifest."""
    entries = list(os.scandir(folder))
    if not entries:
        raise ValueError(f"{prefix or folder.name + '/'} is empty")
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield prefix + entry.name
        else:
            raise ValueError(f"{prefix}{entry.name} is no ordinary file")


def _size_and_hash(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _text(files: dict[str, dict[str, Any]]) -> bytes:
    return (json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True) + "\n").encode()
