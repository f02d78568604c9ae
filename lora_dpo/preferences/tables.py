"""Parquet, Arrow and CSV files, and `datasets.Dataset` objects, row by row."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any

from lora_dpo.errors import DataError
from lora_dpo.preferences.records import BadRowError, RawRow, RefusalError, Where

BATCH_ROWS = 1000
LONGEST_FIELD = 2**31 - 1


def read_csv(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """Rows under a header. A cell that begins with "[{" and is JSON is read as a list (messages, tools)."""
    csv.field_size_limit(LONGEST_FIELD)  # Python's default of 128 KiB is shorter than some conversations
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            # strict: without it an unclosed quote swallows the rest of the file in silence
            records = csv.reader(text, strict=True)
            header = next(records, [])
            _check_header(header, name)
            for cells in filter(None, records):
                number += 1
                yield Where(name, number), _csv_row(header, cells)
    except csv.Error as error:
        raise BadRowError(Where(name, number + 1), "malformed CSV", str(error)) from None


def _check_header(header: list[str], name: str) -> None:
    if not header:
        raise DataError(f"{name}: the file is empty; its first line must name the columns")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{name}: the header names {', '.join(map(repr, repeated))} more than once")


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return RefusalError("malformed CSV", f"{len(cells)} fields where the header has {len(header)}")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return RefusalError("invalid UTF-8", "the row holds bytes that are no UTF-8")
    return {column: _cell(cell) for column, cell in zip(header, cells, strict=True)}


def _cell(text: str) -> object:
    if not text.startswith("[{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_parquet(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    with _damage_reported(name, "Parquet"):
        file = pq.ParquetFile(stream)
        yield from _batch_rows(file.iter_batches(batch_size=BATCH_ROWS), name)


def read_arrow(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """The IPC file format, or the IPC stream format that `datasets` writes."""
    import pyarrow as pa

    with _damage_reported(name, "Arrow"):
        is_file_format = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file_format:
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        yield from _batch_rows(batches, name)


@contextlib.contextmanager
def _damage_reported(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes pyarrow raise errors of many types
        raise DataError(f"{name}: cannot be read as {kind}: {error}") from error


def _batch_rows(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in _rows_of_batch(batch):
            number += 1
            yield Where(name, number), row


def _rows_of_batch(batch: Any) -> list[object]:
    """The rows of a pyarrow.RecordBatch; a row whose values are damaged becomes a `RefusalError`."""
    try:
        batch.validate(full=True)  # converting unchecked values of a damaged file can crash the process
        return [without_absent(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is a ValueError
        if batch.num_rows > 1:  # find its row
            return [row for index in range(batch.num_rows) for row in _rows_of_batch(batch.slice(index, 1))]
        return [RefusalError("invalid UTF-8" if "UTF8" in str(error) else "unreadable value", str(error))]


def read_dataset(dataset: Any, name: str) -> Generator[RawRow, None, None]:
    """The rows of a `datasets.Dataset` or `IterableDataset`."""
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    for number, row in enumerate(dataset, start=1):
        yield Where(name, number), without_absent(row)


def without_absent(value: Any) -> Any:
    """The value without None-valued keys at any depth.

    Arrow gives every struct of a column the keys of all others and fills them with None, so that a None there
    is a key that was absent.
    """
    if isinstance(value, dict):
        return {key: without_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_absent(item) for item in value]
    return value
