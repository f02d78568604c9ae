"""The folder of a run.

recipe.yaml        the resolved recipe; `lora-dpo train recipe.yaml` replays it
metrics.jsonl      one record a step or evaluation
samples.jsonl      generations of base and policy side by side
evaluation.json    the last evaluation
checkpoints/       step-000120/: adapter, optimizer, counters and a manifest with every file's SHA-256
adapter/           the trained adapter, in PEFT's layout
reference/         the adapter that was its reference at the end, where one was
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_dpo.errors import RunError
from lora_dpo.run_directory.writing import restore_or_sweep, sync, write_text

OWN_NAMES = frozenset(
    (
        "recipe.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.json",
        "quickstart.json",
        "adapter",
        "reference",
    )
)
"""What is written by one rename right below a run directory."""


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder by its name; None for the name of anything else."""
    match = re.fullmatch(r"step-(\d{6,})", name)
    return int(match[1]) if match else None


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: $LORA_DPO_CACHE, or the user's cache folder."""
    home = os.environ.get("LORA_DPO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lora_dpo"
    return Path(home).expanduser()


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter's tensors lie in a folder."""
    return (folder / "adapter_model.safetensors").is_file()


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
            begun = run.recipe_file.exists() or bool(run.checkpoints())
            if begun or not resume:
                run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
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
        """Nobody else writes here for the while. Raises RunError if somebody does.

        The system holds the lock, not the file: of a dead process it is not in the way.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is training in {self.path}: name another run_directory"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise RunError(f"run_directory: {self.path} cannot be locked: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def sweep(self) -> None:
        """Remove what a killed process left half-written; put back what it was about to replace."""
        restore_or_sweep(self.path, OWN_NAMES.__contains__)
        restore_or_sweep(self.checkpoints_folder, lambda name: step_of(name) is not None)

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
    def has_adapter(self) -> bool:
        """Whether the run wrote its adapter, which is the last thing it does, by one rename."""
        return holds_adapter(self.adapter_folder)

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
        if not self.checkpoints_folder.is_dir():
            return []
        found = [p for p in self.checkpoints_folder.iterdir() if step_of(p.name) is not None and p.is_dir()]
        return sorted(found, key=lambda folder: step_of(folder.name) or 0)

    def records(self, lost: Callable[[int], None] = lambda line: None) -> Iterator[dict[str, Any]]:
        """The metrics that were written so far. `lost` is told the number of each line that can't be read."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                record = _record(line)
                if record is None:
                    lost(number)
                else:
                    yield record

    def drop_records_after(self, step: int, *, evaluated: bool = True) -> list[int]:
        """Cut the metrics back to a step, so that a resumed run has no step twice.

        evaluated: whether what was measured after that very step is kept. Returns the numbers of lines that
        could not be read, but for a last one, which a kill may cut.
        """
        lost: list[int] = []
        try:
            records = list(self.records(lost.append))
        except OSError as error:
            raise RunError(f"cannot read {self.metrics_file}: {error.strerror}") from error

        def kept(record: Mapping[str, Any]) -> bool:
            return record["step"] < step or (
                record["step"] == step and (evaluated or record["kind"] == "step")
            )

        write_text(self.metrics_file, "".join(json.dumps(r) + "\n" for r in records if kept(r)))
        return [number for number in lost if number != len(records) + len(lost)]

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Write one more line; a number that is none becomes null. Raises RunError, the file as before."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        text = (json.dumps(plain, allow_nan=False) + "\n").encode()
        try:
            with self.metrics_file.open("ab", buffering=0) as lines:
                end = lines.tell()
                try:
                    if lines.write(text) != len(text):  # a full disk may take a part
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    with contextlib.suppress(OSError):
                        lines.truncate(end)
                    raise
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_file}: {error.strerror}") from error

    def sync_records(self) -> None:
        """Before a checkpoint: what it counts as told must outlive a power cut. Raises RunError."""
        try:
            if self.metrics_file.exists():
                sync(self.metrics_file)
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_file}: {error.strerror}") from error


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics; None for one that is cut or damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record
    return record if whole else None
