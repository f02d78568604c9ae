"""Reference log-probs on disk: one row an example, read whole micro-batches at a time, committed once a step.

Legend: `S` score rows of a micro-batch.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch, sent
from lora_dpo.model import Model
from lora_dpo.reference.database import Database, open_database
from lora_dpo.reference.fresh import reference_logprobs
from lora_dpo.reference.identity import reference_fingerprint, reference_identity
from lora_dpo.run_directory import cache_folder


class ReferenceCache:
    """What one reference said of the examples that were met before, in this run or another.

    A micro-batch is read whole, or computed whole. Where it is computed because some example of it is not
    known yet, the others keep their known values: an example's are decided once, at its first computation.
    Otherwise a run that was killed and resumed, and so finds more than the uninterrupted one found, would go
    on with other bits, since another packing moves a log-prob by a rounding.

    A file that can't be used stops nothing: `say` is told, and every micro-batch is computed.
    hits, misses: examples of micro-batches that were read, and of those that were computed.
    """

    def __init__(
        self,
        file: Path,
        identity: str,
        *,
        dtype: torch.dtype = torch.float32,
        say: Callable[[str], None] = lambda line: None,
    ):
        """dtype: what log-probs are stored as; a function of the model, and so of the identity."""
        self.file = file
        self.hits = self.misses = 0
        self._say = say
        self._dtype = np.dtype("<f8" if dtype == torch.float64 else "<f4")
        # Values of this step, on the device where they were computed, until `commit`.
        self._pending: dict[bytes, Tensor] = {}
        self._database: Database | None = None
        try:
            self._database, wrong = open_database(file, identity)
        except (sqlite3.Error, OSError) as error:
            self._switch_off(error)
        else:
            if wrong:
                say(f"reference cache: {file} was set aside: {wrong}")

    @classmethod
    def open(
        cls,
        model: Model,
        *,
        reference: str | None = None,
        base: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> ReferenceCache:
        """The cache of this model's reference as it is now, in the user's cache folder (see `cache_folder`).

        reference, base: their fingerprints, where they are known; the base's takes seconds for gigabytes.
        """
        identity = reference_identity(model, reference or reference_fingerprint(model), base=base)
        return cls(reference_folder() / f"{identity}.sqlite", identity, dtype=model.compute_dtype, say=say)

    @property
    def on(self) -> bool:
        """Whether there is a file to read from and write to."""
        return self._database is not None

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self.drop_pending()
        if self._database is not None:
            self._database.close()
            self._database = None

    def logprobs(self, model: Model, batch: MicroBatch) -> Tensor:
        """log ref(target) of each score row, float32 (float64 for a float64 model) [S], without gradient.

        Read where every example of the micro-batch is known, else computed; nothing waits for the device.
        """
        known = self._read(dict(zip(batch.keys, batch.rows, strict=True)))
        if known.keys() >= set(batch.keys):
            self.hits += len(batch.keys)
            return _joined([known[key] for key in batch.keys], batch.targets.device)
        self.misses += len(batch.keys)
        fresh = reference_logprobs(model, batch)
        for key, values in zip(batch.keys, fresh.split(batch.rows), strict=True):
            if key not in known:
                known[key] = self._pending[key] = values
        return _joined([known[key] for key in batch.keys], fresh.device)

    def peek(self, batch: MicroBatch) -> Tensor | None:
        """What `logprobs` would read [S], or None where it would compute; counts nothing."""
        known = self._read(dict(zip(batch.keys, batch.rows, strict=True)))
        if not known.keys() >= set(batch.keys):
            return None
        return _joined([known[key] for key in batch.keys], batch.targets.device)

    def commit(self) -> None:
        """Write what was computed since the last commit, in one transaction.

        A log-prob that is not finite is not kept: whatever broke must not outlive the run.
        """
        pending, self._pending = self._pending, {}
        if not pending or self._database is None:
            return
        # One copy from the device for all of them.
        flat = torch.cat(list(pending.values())).cpu().numpy().astype(self._dtype, copy=False)
        ends = np.cumsum([len(values) for values in pending.values()])
        parts = dict(zip(pending, np.split(flat, ends[:-1]), strict=True))
        whole = {key: values.tobytes() for key, values in parts.items() if np.isfinite(values).all()}
        try:
            self._database.write(whole)
        except sqlite3.Error as error:
            self._switch_off(error)

    def drop_pending(self) -> None:
        """Forget what was computed since the last commit: the step failed, or begins again."""
        self._pending = {}

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that have a row in the file."""
        try:
            return self._database.keys(list(set(keys))) if self._database is not None else set()
        except sqlite3.Error as error:
            self._switch_off(error)
            return set()

    def clear(self) -> None:
        """Forget everything that this file holds."""
        self.drop_pending()
        try:
            if self._database is not None:
                self._database.clear()
        except sqlite3.Error as error:
            self._switch_off(error)

    def _read(self, rows: dict[bytes, int]) -> dict[bytes, Tensor]:
        """Known log-probs by key, each of as many values as the example has score rows.

        What this very step computed before counts as known: it may hold an example twice.
        """
        known = {key: self._pending[key] for key in rows if key in self._pending}
        if self._database is None:
            return known
        try:
            size = self._dtype.itemsize
            stored = self._database.read({key: n * size for key, n in rows.items() if key not in known})
        except sqlite3.Error as error:
            self._switch_off(error)
            return known
        native = self._dtype.newbyteorder("=")
        for key, value in stored.items():
            known[key] = torch.from_numpy(np.frombuffer(value, self._dtype).astype(native))
        return known

    def _switch_off(self, error: Exception) -> None:
        self._say(f"reference cache: off for this run, {self.file} cannot be used: {error}")
        if self._database is not None:
            self._database.close()
            self._database = None


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """One after another, on that device; without waiting for it."""
    if all(part.device.type == "cpu" for part in parts):
        return sent(torch.cat(parts), device)
    return torch.cat([sent(part, device) for part in parts])


def reference_folder() -> Path:
    """Where the files lie, one a reference; they may be deleted whenever no run is using them."""
    return cache_folder() / "reference"
