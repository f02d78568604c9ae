"""Writing so that a reader, or whoever comes after a crash, sees the old or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lora_dpo.errors import RunError
from lora_dpo.run_directory.manifest import MANIFEST, manifest_of

LOCK = ".lock"
"""In a folder that is growing: the system holds the lock, not the file."""

SPARE = 2**20
"""Bytes left free beside what is to be written: metrics, and what file systems keep for themselves."""


def write_text(file: Path, text: str) -> None:
    """Write a file whole, by one rename after fsync. Raises RunError; the old content is then still there."""
    part = file.with_name(f".{file.name}.part")
    try:
        try:
            with part.open("w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
            sync(file.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error


def write_folder(folder: Path, fill: Callable[[Path], None], *, manifest: bool = False) -> None:
    """Fill a folder beside its place, sync it, then put it in its place by one rename.

    What was there before stays until then. Whatever `fill` raises, nothing is left of the new one. Raises
    RunError where the system refuses to write.
    """
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            fill(part)
            if manifest:
                (part / MANIFEST).write_bytes(manifest_of(part))
            for file in part.rglob("*"):
                sync(file)
            sync(part)
            _put_in_place(part, folder, old)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {error}") from error


def grow_folder(folder: Path, fill: Callable[[Path], None], *, fresh: bool = False) -> None:
    """`write_folder` for what takes long, by one process at a time: whoever is stopped leaves what he had in
    the hidden folder beside its place, where `fill` finds it the next time.

    A disk that is full, or refuses, leaves nothing. fresh: so does whatever else `fill` raises, and it starts
    with an empty folder. Raises RunError where the system refuses to write, and where another process is
    filling it.
    """
    part = folder.with_name(f".{folder.name}.part")
    if part.is_symlink():
        raise RunError(f"cannot write {folder}: {part} is a link")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with _locked(part / LOCK):
            try:
                if fresh:
                    empty(part)
                _fill_and_place(part, folder, fill)
            except BaseException as error:
                refused = error.__cause__ if isinstance(error, RunError) else error
                with contextlib.suppress(OSError):
                    if fresh or isinstance(refused, (OSError, SafetensorError)):
                        empty(part)
                    _remove_if_empty(part)
                raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error


def _fill_and_place(part: Path, folder: Path, fill: Callable[[Path], None]) -> None:
    fill(part)
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    # Held, though its file is gone: nobody else begins in the folder while it is put in its place.
    (part / LOCK).unlink(missing_ok=True)
    _put_in_place(part, folder, folder.with_name(f".{folder.name}.old"))


def empty(folder: Path) -> None:
    """Remove all but the lock from a folder that is growing. Raises OSError."""
    for file in folder.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != LOCK:
            file.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds at most its lock. Raises OSError."""
    if not {file.name for file in folder.iterdir()} - {LOCK}:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is writing {file.parent}") from None
    try:
        yield
    finally:
        lock.release()


def _put_in_place(part: Path, folder: Path, old: Path) -> None:
    before = folder.exists()
    if before:
        shutil.rmtree(old, ignore_errors=True)
        # A process that dies between the two renames leaves the old one for `restore_or_sweep`.
        os.replace(folder, old)
    try:
        os.replace(part, folder)
        sync(folder.parent)
    except BaseException:
        if folder.exists():
            os.replace(folder, part)
        if before:
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder; whoever dies meanwhile leaves none that looks whole. Raises RunError."""
    gone = folder.with_name(f".{folder.name}.gone")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise RunError(f"cannot delete {folder}: {error}") from error


def restore_or_sweep(parent: Path, own: Callable[[str], bool]) -> None:
    """Remove what a dead process left half-written or half-deleted; a folder that it was about to replace
    comes back. own: of the names that are written here; others are not touched. Raises RunError.
    """
    try:
        for left in list(parent.iterdir()):
            name, ending = left.stem.removeprefix("."), left.suffix
            if not (left.name.startswith(".") and own(name) and ending in (".old", ".part", ".gone")):
                continue
            place = parent / name
            if ending == ".old" and not place.exists():
                os.replace(left, place)
            else:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except OSError as error:
        raise RunError(f"cannot clear {parent}: {error}") from error


def need_space(folder: Path, size: int, what: str) -> None:
    """Raise RunError if `size` bytes and some to spare aren't free where a folder lies, or will lie."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # not told: a write will say so
    if free < size + SPARE:
        raise RunError(
            f"{what} takes {in_words(size + SPARE)}, and {in_words(free)} are free in {place}: make room"
            " there, or name a folder on another disk"
        )


def in_words(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{max(size, 0) / 2**20:,.1f} MiB"


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk. Raises OSError."""
    if os.name == "nt":
        return  # Windows syncs neither folders nor what is open for reading only
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync for folders; a full disk is another matter.
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
