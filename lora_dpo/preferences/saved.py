"""Folders that `datasets.save_to_disk` wrote, opened only where every name inside them stays inside.

Their JSON files name other files. A folder from a stranger could name "../../somebody/else.arrow" there; such
a name is refused before `datasets` sees it. Links in the file system are another matter: they are followed,
because a link is what its owner put there (the hub's cache consists of them), and no file format can bring
one along.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_dpo.errors import DataError
from lora_dpo.preferences.json_rows import MalformedError, parse
from lora_dpo.preferences.records import RefusalError

SPLITS = "dataset_dict.json"
STATE = "state.json"


def is_saved_dataset(folder: Path) -> bool:
    return (folder / SPLITS).is_file() or (folder / STATE).is_file()


def open_saved(folder: Path, split: str | None, name: str) -> Any:
    """The `datasets.Dataset` of a saved folder or of one of its splits. Raises DataError."""
    folder = Path(os.path.abspath(folder))
    if (folder / STATE).is_file():
        if split is not None:
            raise DataError(f"{name}: the folder holds one dataset without splits")
        return _open(folder, name)
    splits = _listed(folder / SPLITS, "splits", name)
    for found in splits:
        _check_inside(found, folder / SPLITS, name)
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        there = ", ".join(map(str, splits))
        raise DataError(f"{name}: name one of the folder's splits after a ':'; there are {there}")
    return _open(folder / split, name)


def _open(folder: Path, name: str) -> Any:
    import datasets

    for file in _listed(folder / STATE, "_data_files", name):
        filename = file.get("filename") if isinstance(file, dict) else None
        _check_inside(filename, folder / STATE, name)
        if not (folder / str(filename)).is_file():
            raise DataError(f"{name}: {folder / STATE} names {filename!r}, and there is no such file")
    try:
        return datasets.Dataset.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes `datasets` raise
        raise DataError(f"{name}: cannot be read as a saved dataset: {error}") from error


def _listed(file: Path, key: str, name: str) -> list[Any]:
    """The list under `key` in a saved dataset's JSON file."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, MalformedError, RefusalError) as error:
        raise DataError(f"{name}: cannot be read as a saved dataset: {file}: {error}") from error
    listed = content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise DataError(f"{name}: cannot be read as a saved dataset: {file} has no list {key!r}")
    return listed


def _check_inside(found: object, file: Path, name: str) -> None:
    """Raises DataError unless `found` names something right in the folder of `file`."""
    if not isinstance(found, str) or found in ("", ".", "..") or set(found) & set("/\\:\0"):
        raise DataError(f"{name}: {file} names {found!r}; it may name files of its own folder only")
