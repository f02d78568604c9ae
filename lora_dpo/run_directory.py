"""What a run leaves on disk, and how: whole files, by one rename.

recipe.yaml        the resolved recipe; `lora-dpo train recipe.yaml` replays it
metrics.jsonl      one record a step or evaluation
samples.jsonl      generations of base and policy side by side
evaluation.json    the last evaluation
checkpoints/       step-000120/: adapter, optimizer, counters and a manifest with every file's SHA-256
adapter/           the trained adapter, in PEFT's layout
reference/         the adapter that was its reference at the end, where one was
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lora_dpo.errors import RunError

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: $LORA_DPO_CACHE, or the user's cache folder."""
    home = os.environ.get("LORA_DPO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lora_dpo"
    return Path(home).expanduser()


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, resume: bool = False) -> RunDirectory:
        """A new run directory, or with `resume` the one that is there. Raises RunError if it is the other
        way.
        """
        run = cls(Path(path).expanduser())
        try:
            run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
            begun = run.recipe_file.exists()
        except (OSError, ValueError) as error:
            raise RunError(f"run_directory: cannot make {run.path}: {error}") from error
        if begun and not resume:
            raise RunError(
                f"{run.path} already holds a run. Give --resume to go on with it, or name another folder with"
                f" run_directory=…"
            )
        if resume and not begun:
            raise RunError(f"--resume: there is no run in {run.path}")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here for the while. Raises RunError if somebody does; a dead one is not in the
        way.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is training in {self.path}: name another run_directory"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.checkpoints_folder):
            for left in [*folder.glob(".*.part"), *folder.glob(".*.old")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The run directory of a run that began earlier. Raises RunError if there is none."""
        run = cls(Path(path).expanduser())
        if not run.recipe_file.is_file():
            raise RunError(f"{path} is not a run directory: it holds no recipe.yaml")
        return run

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def reference_folder(self) -> Path:
        return self.path / "reference"

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint_folder(self, step: int) -> Path:
        return self.checkpoints_folder / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return sorted(p for p in self.checkpoints_folder.glob("step-*") if p.is_dir())

    def forget_checkpoints(self, keep: int, also: Path | None) -> None:
        """Delete all but the newest `keep` checkpoints, and `also`."""
        for old in self.checkpoints()[:-keep]:
            if old != also:
                shutil.rmtree(old)

    def records(self) -> Iterator[dict[str, Any]]:
        """The metrics that were written so far."""
        if self.metrics_file.exists():
            with self.metrics_file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.endswith("\n"))

    def drop_records_after(self, step: int) -> None:
        """Cut the metrics back to a step, so that a resumed run has no step twice."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_text(self.metrics_file, "".join(kept))

    def append_record(self, record: Mapping[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file whole: a reader sees the old content or the new, never a part. Raises RunError."""
    try:
        _write_text(file, text)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error


def _write_text(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def write_folder(folder: Path, fill: Callable[[Path], None], *, manifest: bool = False) -> None:
    """Fill a folder beside its place, sync it, then put it in its place by one rename. Raises RunError."""
    try:
        _write_folder(folder, fill, manifest)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {error}") from error


def _write_folder(folder: Path, fill: Callable[[Path], None], manifest: bool) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    if manifest:
        write_text(part / MANIFEST, json.dumps(_hashes(part), indent=1))
    for file in part.rglob("*"):
        _sync(file)
    _sync(part)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old)
    else:
        os.replace(part, folder)
    _sync(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: None if every file is what its manifest says."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    found = _hashes(folder)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{', '.join(wrong)} differ from the manifest" if wrong else None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): _sha256(p) for p in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows syncs neither folders nor what is open for reading only
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
