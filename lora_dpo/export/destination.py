"""Where an export goes: a new folder, in nobody else's."""

from __future__ import annotations

from pathlib import Path

from lora_dpo.errors import RunError
from lora_dpo.export.proof.report import FILE, Kind
from lora_dpo.export.source import Source
from lora_dpo.model.saved import CONFIG
from lora_dpo.run_directory import MANIFEST, OWN_NAMES

OTHERS = {CONFIG: "an adapter's folder", MANIFEST: "what a run wrote", FILE: "an earlier export"}
"""Files that mark a folder as somebody's: what a folder is that holds one."""

ANOTHER = "choose another with --output"


def destination(source: Source, kind: Kind, to: Path | None = None) -> Path:
    """The folder for an export, by default `export-KIND` in the run's or beside the adapter's.

    Raises RunError where none can be made there, or it would lie in what a run or another export wrote.
    """
    if to is None:
        home = source.run.path if source.run else source.adapter.resolve().parent
        to = home / (f"export-{kind}" if source.run else f"{source.name}-export-{kind}")
    if not str(to).isprintable():
        raise RunError(f"--output got {str(to)!r}: such characters are not taken in the name of a folder")
    to = to if to.name not in ("", "..") else to.resolve()  # those have no name to put another one beside
    refuse_existing(to)
    _refuse_owned(to)
    return to


def refuse_existing(folder: Path) -> None:
    """Raise RunError if something is there already (an export overwrites nothing), or no folder can be."""
    try:
        reason = _in_the_way(folder)
    except (OSError, ValueError) as error:
        reason = f"{folder} cannot be made: {getattr(error, 'strerror', None) or error}"
    if reason is not None:
        raise RunError(f"{reason}: {ANOTHER}")


def _in_the_way(folder: Path) -> str | None:
    if folder.is_symlink():
        return f"{folder} is a link" + ("" if folder.exists() else " that leads nowhere")
    if folder.is_dir():
        return f"{folder} is there already and is not empty" if any(folder.iterdir()) else None
    if folder.exists():
        return f"{folder} is a file"
    above = next(parent for parent in folder.absolute().parents if parent.exists() or parent.is_symlink())
    return None if above.is_dir() else f"{folder} cannot be made: {above} is no folder"


def _refuse_owned(folder: Path) -> None:
    """Raise RunError for a folder in one that is checked, replaced or pushed as a whole."""
    place = folder.resolve()
    for inner in (place, *place.parents):
        if inner.name in (*OWN_NAMES, "checkpoints") and (inner.parent / "recipe.yaml").is_file():
            raise RunError(f"{folder} would lie in {inner}, which belongs to the run around it: {ANOTHER}")
        mark = next((name for name in OTHERS if inner != place and (inner / name).is_file()), None)
        if mark is not None:
            raise RunError(f"{folder} would lie in {inner}, {OTHERS[mark]}: {ANOTHER}")
