"""Every file type, folder, hub id and object gives the same rows, and a damaged one a `DataError`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_dpo.errors import DataError
from lora_dpo.preferences import BadRow, load_preferences
from lora_dpo.preferences.sources import rows_of
from lora_dpo.recipe import Data, Source

datasets.disable_progress_bars()

ROWS = [
    {"prompt": f"caf\u00e9 {number}", "chosen": "y\u2028es\r\n", "rejected": 'no, "not" \U0001f600'}
    for number in range(5)
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


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
    with pytest.raises(BadRow, match=r"pairs.parquet row 2: invalid UTF-8"):
        load_preferences(Data(str(tmp_path / "pairs.parquet")))
    loaded = load_preferences(Data(str(tmp_path / "pairs.parquet"), on_bad_row="skip"))
    assert [record.where.row for record in loaded.train] == [1, 3]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_emptied_file_is_a_data_error_or_shorter(tmp_path: Path, name: str) -> None:
    ending, write = FILES[name]
    content = write(ROWS)
    for size in (0, 1, 7, len(content) // 2, len(content) - 9):
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


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(ROWS[2:]))
    (tmp_path / "a.json").write_bytes(as_json(ROWS[:2]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jsonl").write_text("not data either")
    assert rows_read(str(tmp_path)) == ROWS
    assert str(load_preferences(Data(str(tmp_path))).train[2].where) == f"{tmp_path / 'b.jsonl'} row 1"


def test_a_split_of_a_folder_is_chosen_by_file_or_subfolder_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-00000-of-00002.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    (data / "train-00001-of-00002.jsonl").write_bytes(as_jsonl(ROWS[1:2]))
    (data / "test_prefs.parquet").write_bytes(as_parquet(ROWS[2:3]))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "x.csv").write_bytes(as_csv(ROWS[3:]))
    assert rows_read(f"{tmp_path}:train") == ROWS[:2]
    assert rows_read(f"{tmp_path}:test") == ROWS[2:3]
    assert rows_read(f"{tmp_path}:val") == ROWS[3:]
    assert rows_read(f"{tmp_path}:data:train") == ROWS[:2]
    with pytest.raises(DataError, match="no files of split 'tset'; there are"):
        rows_read(f"{tmp_path}:tset")
    with pytest.raises(DataError, match="holds splits test_prefs, train, val; name one"):
        rows_read(str(tmp_path))


def test_a_saved_dataset_is_a_folder_with_or_without_splits(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    splits.save_to_disk(tmp_path / "several")
    assert rows_read(str(tmp_path / "one")) == ROWS
    assert rows_read(f"{tmp_path / 'several'}:test") == ROWS[:1]
    with pytest.raises(DataError, match="there are train, test"):
        rows_read(str(tmp_path / "several"))
    with pytest.raises(DataError, match="without splits"):
        rows_read(f"{tmp_path / 'one'}:train")
    with pytest.raises(DataError, match="give one of its splits: train, test"):
        rows_read(splits)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        rows_read(str(tmp_path / "one"))


def test_rows_may_be_in_memory() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    for given in (dataset, (dataset,), (dataset.select([0, 1]), dataset.select([2, 3, 4]))):
        assert rows_read(given) == ROWS
    assert rows_read(dataset.with_format("torch")) == ROWS
    assert str(load_preferences(Data(dataset)).train[4].where) == "dataset row 5"
    for rows in (dataset.to_iterable_dataset(), ROWS):
        assert [row for _, row in rows_of(rows)] == ROWS
    with pytest.raises(DataError, match="int is not a path"):
        rows_of(3)


def test_relative_paths_start_from_the_base_directory(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("a local path wins over a hub id")
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl(ROWS))
    loaded = load_preferences(Data("pairs.jsonl"), base_dir=tmp_path)
    assert str(loaded.train[0].where) == "pairs.jsonl row 1"
    with pytest.raises(DataError, match="org/name: files of this type are not read"):
        load_preferences(Data("org/name"), base_dir=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["pairs.jsonl", "./pairs", "/no/such/pairs", "~/no/such", "C:\\data\\pairs", "C:/x/pairs.json", "pairs", "a/b/c",
     "org/name:a:b:c", "org/pairs.jsonl", "\0", "x" * 5000, "~nobody-here/x", "a\nb/c"],
)  # fmt: skip
def test_a_missing_local_path_is_refused_without_the_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_preferences(Data(name), base_dir=tmp_path)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl(ROWS))
    with pytest.raises(DataError, match=r"pears.jsonl: there is no such .*; did you mean .*pairs.jsonl\?"):
        load_preferences(Data(str(tmp_path / "pears.jsonl")))
    with pytest.raises(DataError, match="a file has no splits"):
        load_preferences(Data(f"{tmp_path / 'pairs.jsonl'}:train"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        load_preferences(Data(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("org/name", None, "train"),
        ("org/name:test_prefs", None, "test_prefs"),
        ("org/na.me:en:test", "en", "test"),
    ],
)
def test_a_hub_id_names_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, name: str, config: str | None, split: str
) -> None:
    calls = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_read(name) == ROWS
    assert calls == [(name.partition(":")[0], {"name": config, "split": split})]
    assert str(load_preferences(Data(name)).train[0].where) == f"{name} row 1"


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), ValueError("Unknown split\nmore"), RuntimeError()]
)
def test_an_unreachable_hub_id_is_a_data_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match="org/name:x: neither a local file or folder nor readable from the hub"
    ):
        load_preferences(Data("org/name:x"))


def test_source_rows_are_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl(ROWS[:2]) + b"\nnot JSON")
    assert rows_read(Source(str(tmp_path / "pairs.jsonl"), rows=2)) == ROWS[:2]
