"""From what a recipe names to rows: a file, a folder, a hub id, or rows already in memory.

A local path that exists always wins, and nothing but a hub id ("org/name") touches the network. No code that
comes with data is run: `datasets` has given up loading scripts, and a folder's ".py" files are not looked at.
"""

from __future__ import annotations

import difflib
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lora_dpo.errors import DataError
from lora_dpo.preferences.json_rows import read_json, read_jsonl
from lora_dpo.preferences.records import RawRow, Where
from lora_dpo.preferences.saved import is_saved_dataset, open_saved
from lora_dpo.preferences.tables import read_arrow, read_csv, read_dataset, read_parquet
from lora_dpo.preferences.unpacking import open_unpacked

Rows = Generator[RawRow, None, None]
"""Closing it closes the file."""

Reader = Callable[[IO[bytes], str], Iterator[RawRow]]
READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".arrow": read_arrow,
}
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
IN_MEMORY = "dataset"
_shard = re.compile(r"-\d+-of-\d+$")
_hub_id = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<first>[^:/\\]+))?(?::(?P<second>[^:/\\]+))?")


def source_name(path: object) -> str:
    """How a source is called in messages."""
    return path if isinstance(path, str) else IN_MEMORY


def rows_of(path: Any, base_dir: Path | None = None) -> Rows:
    """The rows of one source, in their order.

    path: a file, "folder", "folder:split", "folder:config:split", "org/name", "org/name:split",
    "org/name:config:split", a `datasets.Dataset`, or an iterable of dicts.
    base_dir: what relative paths start from (the working directory if None).
    """
    if not isinstance(path, str):
        return _rows_in_memory(path)
    local, parts = _existing(path, base_dir)
    if local is not None:
        return _rows_of_local(local, parts, path)
    match = _hub_id.fullmatch(path)
    if match is None or _looks_like_a_path(path):
        raise DataError(_not_found(path, base_dir))
    first, second = match["first"], match["second"]
    return _rows_of_hub(match["id"], first if second else None, second or first or "train", path)


def _rows_in_memory(rows: Any) -> Rows:
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, rows))
        raise DataError(
            f"data.train: a mapping was given where rows are needed; give one of its splits: {names}"
        )
    if not isinstance(rows, Iterable):
        raise DataError(f"data.train: {type(rows).__name__} is not a path, a hub id or a datasets.Dataset")
    if type(rows).__module__.startswith("datasets."):
        return read_dataset(rows, IN_MEMORY)
    return ((Where(IN_MEMORY, number), row) for number, row in enumerate(rows, start=1))


def _existing(path: str, base_dir: Path | None) -> tuple[Path | None, list[str]]:
    """The longest existing path at the front, and the split or [configuration, split] named after it."""
    head, parts = path, []
    while True:
        candidate = _resolve(head, base_dir)
        if candidate is not None and os.path.exists(candidate):  # unlike Path.exists, False for any odd name
            return candidate, parts
        head, colon, last = head.rpartition(":")
        is_drive = len(head) == 1 and last.startswith(("\\", "/"))
        if not colon or is_drive or len(parts) == 2:
            return None, []
        parts = [last, *parts]


def _resolve(path: str, base_dir: Path | None) -> Path | None:
    if not path or "\0" in path:
        return None
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user
        return None
    return expanded if base_dir is None else base_dir / expanded


def _looks_like_a_path(path: str) -> bool:
    names_a_file = _reader(path.partition(":")[0]) is not None
    return names_a_file or path.startswith(("./", "../", "/", "~", ".\\", "..\\")) or "\\" in path


def _not_found(path: str, base_dir: Path | None) -> str:
    text = f"{path}: there is no such file or folder"
    if not _looks_like_a_path(path):
        text += ", and it is not a hub id (org/name, org/name:split or org/name:config:split)"
    wanted = _resolve(path, base_dir)
    if wanted is None or not wanted.parent.is_dir():
        return text
    try:
        names = sorted(entry.name for entry in wanted.parent.iterdir())
    except OSError:
        return text
    nearest = difflib.get_close_matches(wanted.name, names, n=1)
    return text + (f"; did you mean {wanted.parent / nearest[0]}?" if nearest else "")


def _rows_of_local(local: Path, parts: list[str], name: str) -> Rows:
    if local.is_dir():
        return _rows_of_folder(local, parts, name)
    if parts:
        raise DataError(f"{name}: a file has no splits; name a folder or a hub id before the ':'")
    return _rows_of_file(local, name)


def _rows_of_file(path: Path, name: str) -> Rows:
    reader = _reader(path.name)
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{name}: files of this type are not read; the types are {known}, each also with .gz")
    if not path.is_file():  # opening a named pipe waits for whoever writes to it, maybe for ever
        raise DataError(f"{name}: is not a regular file; write the data to one")
    last = "at its beginning"
    try:
        with _open(path) as stream:
            for where, row in reader(stream, name):
                last = f"after row {where.row}"
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read {last}: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return open_unpacked(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _reader(file_name: str) -> Reader | None:
    return READERS.get(Path(file_name.lower().removesuffix(".gz")).suffix)


def _rows_of_folder(folder: Path, parts: list[str], name: str) -> Rows:
    for part in parts[:-1]:
        folder = folder / part
    split = parts[-1] if parts else None
    if not folder.is_dir():
        raise DataError(f"{name}: there is no folder {folder}")
    if is_saved_dataset(folder):
        return read_dataset(open_saved(folder, split, name), name)
    files = _data_files(folder, split, name)
    return _rows_of_files(files)


def _rows_of_files(files: list[Path]) -> Rows:
    for file in files:
        yield from _rows_of_file(file, str(file))


def _data_files(folder: Path, split: str | None, name: str) -> list[Path]:
    try:
        files = sorted(file for file in folder.rglob("*") if _reader(file.name) and _is_visible(file, folder))
    except OSError as error:
        raise DataError(f"{name}: the folder cannot be read: {error}") from None
    if not files:
        raise DataError(f"{name}: the folder holds no data files ({', '.join(READERS)})")
    splits = {file: _split_of(file, folder) for file in files}
    if split is None:
        named = sorted({found for found in splits.values() if re.split(r"[-_.]", found)[0] in SPLIT_NAMES})
        if len(named) > 1:
            raise DataError(
                f"{name}: the folder holds splits {', '.join(named)}; name one, as {name}:{named[0]}"
            )
        return files
    exact = [file for file in files if split in (splits[file], file.relative_to(folder).parts[0])]
    chosen = exact or [file for file in files if file.name.startswith(split)]
    if not chosen:
        found = ", ".join(sorted(set(splits.values())))
        raise DataError(f"{name}: the folder has no files of split {split!r}; there are {found}")
    return chosen


def _is_visible(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts
    return file.is_file() and not any(part.startswith((".", "_")) for part in inside)


def _split_of(file: Path, folder: Path) -> str:
    """The split a file belongs to: the subfolder of that name, or its own name without ending and shard."""
    first = file.relative_to(folder).parts[0]
    if first != file.name and first.partition("_")[0] in SPLIT_NAMES:
        return first
    return _shard.sub("", Path(file.name.removesuffix(".gz")).stem)


def _rows_of_hub(repository: str, config: str | None, split: str, name: str) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(repository, name=config, split=split)
    except (
        Exception
    ) as error:  # the network, the hub and `datasets` have many ways to fail; the user has one name
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"neither a local file or folder nor readable from the hub (split {split!r} of {repository})"
        raise DataError(f"{name}: {what}: {first_line}") from error
    return read_dataset(dataset, name)
