"""What things are called where everybody can read it: hub ids as they are, the user's own paths by their last
part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from lora_dpo.recipe import Recipe, Source, to_dict

_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_HUB_DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(:[^:/\\]+){0,2}", re.ASCII)
_DATA_FILE = re.compile(r"\.(json|jsonl|ndjson|parquet|csv|arrow)(\.gz)?$", re.IGNORECASE)
_ABSOLUTE = re.compile(r"([/~]|\\\\|[A-Za-z]:[\\/])[^\n]*")
_STEP = r"[\\/][^\s\\/'\"`,;()]+"
# A path with a folder in it, where no word, address or other path goes before it.
_PATH_IN_TEXT = re.compile(rf"(?<![\w:/.~\\<])(?:(?:[A-Za-z]:|~)(?:{_STEP})+|(?:{_STEP}){{2,}})[\\/]?")
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")


def hub_model(name: str) -> str | None:
    """The hub id that a base is named by; None for a local folder."""
    return name if _HUB_MODEL.fullmatch(name) and not _is_there(name) else None


def hub_dataset(source: Any) -> str | None:
    """The hub id that a source of a run's recipe names; None for files, folders and rows from Python.

    A run's recipe has every local path absolute, so that what is not is the hub's.
    """
    path = source.path if isinstance(source, Source) else source
    match = _HUB_DATASET.fullmatch(path) if isinstance(path, str) else None
    return None if match is None or _DATA_FILE.search(match["id"]) or _is_there(match["id"]) else match["id"]


def _is_there(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def last_part(path: object) -> str:
    """A path's last part: "pairs.jsonl" of "/home/me/pairs.jsonl"."""
    return re.split(r"[\\/]", str(path).rstrip("\\/"))[-1]


def public_text(text: str) -> str:
    """Text with every absolute path in it by its last part, and no tokens."""
    return without_tokens(_PATH_IN_TEXT.sub(lambda match: last_part(match[0]), text))


def without_tokens(text: str) -> str:
    """Text without what looks like an access token of the hub."""
    return _TOKEN.sub(r"\1_…", text)


def paths_in(text: str) -> list[str]:
    """The absolute paths in a text that are there on this machine."""
    found = (match[0] for match in _PATH_IN_TEXT.finditer(text))
    return [path for path in found if len(re.split(r"[\\/]", path)) > 2 and _is_there(path)]


def public_source(source: Any) -> str:
    """How a data source is called: a hub id with its split, or a file's or folder's name."""
    path = source.path if isinstance(source, Source) else source
    if not isinstance(path, str):
        return f"{len(path):,} rows given from Python"
    return path if hub_dataset(path) else last_part(path)


def public_base(name: str) -> str:
    return hub_model(name) or last_part(name)


def sources_of(value: Any) -> Iterator[Any]:
    """The sources of data.train or data.eval, one or several."""
    yield from value if isinstance(value, tuple) else (value,)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """`to_dict`, its local paths by their last parts."""
    values: dict[str, Any] = _public(to_dict(recipe))
    values["base"]["model"] = public_base(recipe.base.model)
    values["run_directory"] = last_part(recipe.run_directory)
    for section, key in (("adapter", "start_from"), ("reference", "adapter")):
        path = getattr(getattr(recipe, section), key)
        values[section][key] = None if path is None else last_part(path)
    return values


def _public(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _public(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key == "chat_template" and "{" in value:  # its text, not a file's name
        return without_tokens(value)
    if key in ("train", "eval", "path"):
        return public_source(value)
    if key in ("objective", "chat_template") or _ABSOLUTE.fullmatch(value):
        return last_part(value)
    return public_text(value)
