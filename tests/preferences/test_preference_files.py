"""Every file type gives the rows that were written, and a damaged file a `DataError`."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_dpo.errors import DataError
from lora_dpo.preferences import BadRowError, load_preferences
from lora_dpo.recipe import Data

ROWS = [
    {"prompt": f"caf\u00e9 {number}", "chosen": "y\u2028es\r\n", "rejected": 'no, "not" \U0001f600'}
    for number in range(5)
]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


FILES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "json": (".json", as_json),
    "json with a BOM": (".json", lambda rows: b"\xef\xbb\xbf" + as_json(rows)),
    "json, list under data": (
        ".json",
        lambda rows: b'{"version": {"a": [1]}, "data":' + as_json(rows) + b', "n": 1}',
    ),
    "json, list under rows": (".json", lambda rows: json.dumps({"rows": rows}).encode()),
    "json lines called json": (".json", as_jsonl),
    "jsonl": (".jsonl", as_jsonl),
    "jsonl with a BOM and CRLF": (
        ".JSONL",
        lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows).replace(b"\n", b"\r\n"),
    ),
    "ndjson": (".ndjson", as_jsonl),
    "csv": (".csv", as_csv),
    "csv with a BOM": (".csv", lambda rows: b"\xef\xbb\xbf" + as_csv(rows)),
    "parquet": (".parquet", as_parquet),
    "arrow file": (".arrow", lambda rows: as_arrow(rows, pa.ipc.new_file)),
    "arrow stream": (".arrow", lambda rows: as_arrow(rows, pa.ipc.new_stream)),
}


def rows_read(path: Any, **data: Any) -> list[dict[str, Any]]:
    loaded = load_preferences(Data(path, format="text", **data))
    return [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in loaded.train]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_rows_that_were_written(tmp_path: Path, name: str, zipped: bool) -> None:
    ending, write = FILES[name]
    file = tmp_path / (f"pairs{ending}" + (".gz" if zipped else ""))
    content = write(ROWS)
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert rows_read(str(file)) == ROWS
    loaded = load_preferences(Data(str(file)))
    assert [(r.where.file, r.where.row) for r in loaded.train] == [(str(file), n) for n in range(1, 6)]


@pytest.mark.parametrize("name", ["json", "parquet", "arrow stream"])
def test_nested_rows_survive_and_keys_that_arrow_fills_in_do_not_appear(tmp_path: Path, name: str) -> None:
    call = {"function": {"name": "get", "arguments": {"at": "x"}}}
    rows = [
        {
            "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
            "rejected": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "1", "name": "get"},
                {"role": "assistant", "content": "b"},
            ],
            "tools": [{"name": "get", "parameters": {"at": {"type": "string"}}}, {"name": "put"}],
        }
    ]
    ending, write = FILES[name]
    file = tmp_path / f"pairs{ending}"
    file.write_bytes(write(rows))
    (record,) = load_preferences(Data(str(file))).train
    assert record.chosen == tuple(rows[0]["chosen"][1:])
    assert record.rejected == tuple(rows[0]["rejected"][1:])
    assert record.tools == tuple(rows[0]["tools"])


def test_a_csv_cell_may_hold_messages_as_json(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    other = [conversation[0], {"role": "assistant", "content": "[{ not JSON"}]
    (tmp_path / "pairs.csv").write_bytes(
        as_csv([{"chosen": json.dumps(conversation), "rejected": json.dumps(other)}])
    )
    (record,) = load_preferences(Data(str(tmp_path / "pairs.csv"))).train
    assert (record.chosen, record.rejected) == ((conversation[1],), (other[1],))


def test_a_single_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert rows_read(str(tmp_path / "one.json")) == ROWS[:1]


def test_long_strings_are_read(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "x" * 10_000_000, "rejected": "b"}
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(as_jsonl([row]) if name == "a.jsonl" else as_csv([row]))
        assert rows_read(str(tmp_path / name)) == [row]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("prompt,chosen,rejected\na,b,c\nd,e\n", "row 2: malformed CSV: 2 fields where the header has 3"),
        ('prompt,chosen,rejected\na,b,c\n"d,e,f\n', "row 2: malformed CSV: unexpected end of data"),
        ("prompt,chosen,chosen\na,b,c\n", "names 'chosen' more than once"),
        ("", "the file is empty"),
        ("prompt,chosen,rejected\n\n", "there are no rows"),
        ("prompt,chosen,rejected\na,b,c\nd,\udce9,f\n", "row 2: invalid UTF-8"),
    ],
)
def test_a_malformed_csv_file_is_refused(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "pairs.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=where):
        load_preferences(Data(str(tmp_path / "pairs.csv")))


def test_invalid_utf8_in_a_table_is_reported_with_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xe9", b"c"], pa.binary()).cast(pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["x", "y", "z"], "chosen": texts, "rejected": ["1", "2", "3"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(BadRowError, match=r"pairs.parquet row 2: invalid UTF-8"):
        load_preferences(Data(str(tmp_path / "pairs.parquet")))
    loaded = load_preferences(Data(str(tmp_path / "pairs.parquet"), on_bad_row="skip"))
    assert [record.where.row for record in loaded.train] == [1, 3]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_emptied_file_is_a_data_error(tmp_path: Path, name: str) -> None:
    ending, write = FILES[name]
    content = write(ROWS)
    end = 5 if ending == ".csv" else 9  # inside the last value: a CSV file cut between values looks whole
    for size in (0, 1, 7, len(content) // 2, len(content) - end):
        (tmp_path / f"cut{ending}").write_bytes(content[:size])
        with pytest.raises(DataError, match="cut"):
            load_preferences(Data(str(tmp_path / f"cut{ending}")))


def test_a_truncated_gzip_file_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "chosen": f"a{n * 7919}", "rejected": "b"} for n in range(20_000)]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows))[:-1000])
    with pytest.raises(DataError, match=r"pairs.jsonl.gz: cannot be read after row \d+"):
        load_preferences(Data(str(tmp_path / "pairs.jsonl.gz")))


def test_a_file_that_is_not_gzip_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(as_jsonl(ROWS))
    with pytest.raises(DataError, match=r"pairs.jsonl.gz: cannot be read"):
        load_preferences(Data(str(tmp_path / "pairs.jsonl.gz")))
