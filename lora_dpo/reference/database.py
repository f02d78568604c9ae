"""A SQLite file that keeps, for each example's key, its log-probs as bytes. One file holds one reference's.

A process may be killed at any moment, and several may write at once: SQLite's write-ahead log keeps the file
whole, and a checksum a row tells a flipped byte from a value. Not for network file systems, whose locks can't
be relied on.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash
from filelock import FileLock

APPLICATION = 0x4C44504F
"""SQLite's application_id of these files: "LDPO"."""

BUSY_SECONDS = 30.0
"""How long one process waits while another commits."""

KEYS_AT_A_TIME = 500
"""SQLite before 3.32 takes 999 parameters a statement."""

SCHEMA = """
CREATE TABLE identity (identity TEXT PRIMARY KEY);
CREATE TABLE logprobs (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL);
"""


class NotOurs(sqlite3.DatabaseError):
    """A file that SQLite can't read, or that holds something else."""


class Database:
    """An open file of one reference. Every method may raise sqlite3.Error."""

    def __init__(self, file: Path, identity: str):
        """Open, or make. Raises NotOurs, sqlite3.Error or OSError."""
        self._bad: dict[bytes, bytes] = {}
        self._connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            self._check(identity)
        except sqlite3.OperationalError:
            self._connection.close()
            raise  # locked, not writable, no space: the file may well be whole
        except (sqlite3.DatabaseError, NotOurs) as error:
            self._connection.close()
            raise NotOurs(str(error)) from error

    def _check(self, identity: str) -> None:
        run = self._connection.execute
        # A checkpoint must not outlive, in a power cut, what its steps computed: the resumed run would
        # compute it again, in another packing.
        run("PRAGMA synchronous = FULL")
        if run("PRAGMA schema_version").fetchone() == (0,):
            run("PRAGMA journal_mode = WAL")
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    run(statement)
                run("INSERT INTO identity VALUES (?)", (identity,))
                run(f"PRAGMA application_id = {APPLICATION}")
        if run("PRAGMA application_id").fetchone() != (APPLICATION,):
            raise NotOurs("it is another program's database")
        tables = {name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables != {"identity", "logprobs"}:
            raise NotOurs("its tables are not there")
        if run("SELECT identity FROM identity").fetchall() != [(identity,)]:
            raise NotOurs("it is another reference's")
        (found,) = run("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise NotOurs(found)

    def close(self) -> None:
        self._connection.close()

    def read(self, sizes: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """The values of those keys that are there and whole. sizes: key → how many bytes its value has."""
        values: dict[bytes, bytes] = {}
        for key, value, checksum in self._select("key, value, checksum", list(sizes)):
            if len(value) == sizes[key] and _checksum(key, value) == checksum:
                values[key] = value
            else:
                self._bad[key] = checksum
        return values

    def keys(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that are there."""
        return {key for (key,) in self._select("key", keys)}

    def _select(self, columns: str, keys: Sequence[bytes]) -> Iterator[tuple]:
        for start in range(0, len(keys), KEYS_AT_A_TIME):
            part = keys[start : start + KEYS_AT_A_TIME]
            marks = ",".join("?" * len(part))
            query = f"SELECT {columns} FROM logprobs WHERE key IN ({marks})"
            yield from self._connection.execute(query, part)

    def write(self, values: Mapping[bytes, bytes]) -> None:
        """Add these in one transaction. What is there already stays, unless it was found to be broken."""
        rows = [(key, value, _checksum(key, value)) for key, value in values.items()]
        bad = [(key, self._bad[key]) for key in values if key in self._bad]
        with self._transaction():
            # By its checksum too: another process may have mended the row since.
            self._connection.executemany("DELETE FROM logprobs WHERE key = ? AND checksum = ?", bad)
            self._connection.executemany("INSERT OR IGNORE INTO logprobs VALUES (?, ?, ?)", rows)
        for key, _ in bad:
            del self._bad[key]

    def clear(self) -> None:
        """Forget every value."""
        with self._transaction():
            self._connection.execute("DELETE FROM logprobs")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.execute("COMMIT")


def open_database(file: Path, identity: str) -> tuple[Database, str | None]:
    """(the file's database, what was wrong with the file that had to be set aside before or None).

    Raises sqlite3.Error or OSError where there can't be one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that find the same broken file: the second must not set aside what the first began.
    with FileLock(file.with_suffix(".lock"), timeout=BUSY_SECONDS):
        try:
            return Database(file, identity), None
        except NotOurs as error:
            aside = _set_aside(file)
            return Database(file, identity), f"{error}; it is now {aside.name}"


def _set_aside(file: Path) -> Path:
    """Rename a database with what belongs to it; returns its new name."""
    number = 1
    while (aside := file.with_name(f"{file.name}.broken-{number}")).exists():
        number += 1
    os.replace(file, aside)
    for suffix in ("-wal", "-shm"):
        beside = file.with_name(file.name + suffix)
        if beside.exists():
            os.replace(beside, aside.with_name(aside.name + suffix))
    return aside


def _checksum(key: bytes, value: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key + value)
