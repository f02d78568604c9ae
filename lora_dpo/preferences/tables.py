"""Parquet, Arrow and CSV files, and `datasets.Dataset` objects, row by row."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any

from lora_dpo.errors import DataError
from lora_dpo.preferences.arrow_rows import rows_of_batch, without_absent
from lora_dpo.preferences.conversations import shown
from lora_dpo.preferences.json_rows import DuplicateError, MalformedError, parse, repeated
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
    check_columns(header, f"{name}: the header")


def check_columns(columns: Iterable[str], what: str) -> None:
    """Raises DataError where two columns have one name: a row can hold one of them only."""
    if twice := repeated(columns):
        raise DataError(f"{what} names {', '.join(map(shown, sorted(twice)))} more than once")


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return RefusalError("malformed CSV", f"{len(cells)} fields where the header has {len(header)}")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return RefusalError("invalid UTF-8", "the row holds bytes that are no UTF-8")
    try:
        return {column: _cell(cell) for column, cell in zip(header, cells, strict=True)}
    except DuplicateError as error:
        return RefusalError("malformed JSON", str(error))


def _cell(text: str) -> object:
    if not text.startswith("[{"):
        return text
    try:
        return parse(text)
    except DuplicateError:
        raise
    except MalformedError:
        return text


def read_parquet(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    with _damage_reported(name, "Parquet"):
        file = pq.ParquetFile(stream)
        check_columns(file.schema_arrow.names, f"{name}: the schema")
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
            file = pa.ipc.open_stream(stream)
            batches = iter(file)
        check_columns(file.schema.names, f"{name}: the schema")
        yield from _batch_rows(batches, name)


@contextlib.contextmanager
def _damage_reported(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise errors of many types
        raise DataError(f"{name}: cannot be read as {kind}: {error}") from error


def _batch_rows(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in rows_of_batch(batch):
            number += 1
            yield Where(name, number), row


def read_dataset(dataset: Any, name: str) -> Generator[RawRow, None, None]:
    """The rows of a `datasets.Dataset` or `IterableDataset`.

    A `Dataset` is read as the Arrow table that it is: features that would open files or addresses named in
    a cell (images, sound) stay the text that they are.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        tables: Any = dataset.with_format("arrow").iter(BATCH_ROWS)  # of pyarrow.Table
        batches = (batch for table in tables for batch in table.to_batches())
        with _damage_reported(name, "a dataset"):
            check_columns(dataset.column_names, f"{name}: the schema")
            yield from _batch_rows(batches, name)
        return
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    for number, row in enumerate(dataset, start=1):
        yield Where(name, number), without_absent(row)
