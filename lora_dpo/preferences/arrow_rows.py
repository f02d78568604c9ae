"""Arrow batches as rows of plain Python values, checked before anything looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_dpo.preferences.json_rows import MalformedError, parse
from lora_dpo.preferences.records import RefusalError


def rows_of_batch(batch: Any) -> Iterator[object]:
    """The rows of a pyarrow.RecordBatch; a row whose values are damaged becomes a `RefusalError`.

    Columns of the type `arrow.json` (what `datasets` calls Json) become the values that their texts are.
    """
    try:
        batch.validate(full=True)  # converting unchecked values of a damaged file can crash the process
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is a ValueError
        if batch.num_rows > 1:  # find its row
            for index in range(batch.num_rows):
                yield from rows_of_batch(batch.slice(index, 1))
        else:
            yield RefusalError("invalid UTF-8" if "UTF8" in str(error) else "unreadable value", str(error))
        return
    as_json = {field.name: field.type for field in batch.schema if _holds_json(field.type)}
    for row in rows:
        yield _row(row, as_json)


def _row(row: dict[str, Any], as_json: dict[str, Any]) -> object:
    # Before JSON texts are read: a null in those is a value.
    present = without_absent(row)
    try:
        for column in as_json.keys() & present.keys():
            present[column] = _decoded(present[column], as_json[column])
    except MalformedError as error:
        return RefusalError("malformed JSON", str(error))
    return present


def _holds_json(kind: Any) -> bool:
    return _is_json(kind) or any(_holds_json(kind.field(n).type) for n in range(kind.num_fields))


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _decoded(value: Any, kind: Any) -> Any:
    """A value of the Arrow type `kind` with its JSON texts read. Raises MalformedError."""
    if isinstance(value, str) and _is_json(kind):
        return parse(value)
    if isinstance(value, dict):
        types = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)}
        return {key: _decoded(item, types[key]) for key, item in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):  # not a map: that is a list of pairs
        return [_decoded(item, kind.value_type) for item in value]
    return value


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
