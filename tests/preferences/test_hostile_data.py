"""Data from a stranger: nothing in it leaves its folder, runs, grows without end or is waited for."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import PLACES, Case, check

from lora_dpo.errors import DataError
from lora_dpo.preferences import load_preferences, unpacking
from lora_dpo.preferences.sources import rows_of
from lora_dpo.recipe import Data

datasets.disable_progress_bars()

ROWS = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
TABLE = pa.Table.from_pylist(ROWS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("odd", sorted(PLACES.keys() - {"bomb, blank lines", "bomb, rows"}))  # seconds each
def test_a_path_to_no_ordinary_data_is_neither_waited_for_nor_unpacked_without_end(
    tmp_path: Path, odd: str
) -> None:
    verdict = check(Case("places", odd=odd), 0, False, tmp_path / "data", seconds=60)
    assert not verdict.problem, verdict.detail
    assert verdict.accepted == (odd == "folder with a named pipe")


def test_a_bomb_takes_little_memory(tmp_path: Path) -> None:
    for name in ("bomb, one line", "bomb, JSON"):
        folder = tmp_path / name
        folder.mkdir()
        source = str(PLACES[name](folder))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
                load_preferences(Data(source))
            assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
        finally:
            tracemalloc.stop()


def test_text_that_packs_well_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "UNSUSPICIOUS", 0)
    rows = [{"prompt": f"{n} {n * 7919} again", "chosen": "a", "rejected": "b"} for n in range(1000)]
    content = "\n".join(map(json.dumps, rows)).encode()
    packed = gzip.compress(content)
    assert len(packed) * 4 < len(content)
    (tmp_path / "pairs.jsonl.gz").write_bytes(packed)
    assert len(load_preferences(Data(str(tmp_path / "pairs.jsonl.gz"))).train) == 1000


@pytest.mark.parametrize(
    "filename",
    ["../other/data.arrow", "..", "/etc/passwd", "sub/x.arrow", "..\\x", "file://x", "s3://a/b", "", None, 3],
)
def test_a_saved_dataset_names_files_of_its_own_folder_only(
    saved: Path, filename: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.Dataset, "load_from_disk", lambda *_: pytest.fail("it was opened"))
    edit(saved / "state.json", _data_files=[{"filename": filename}])
    with pytest.raises(DataError, match=r"state\.json names .* of its own folder only"):
        load_preferences(Data(str(saved)))


def test_a_saved_dataset_cannot_name_a_folder_outside_as_a_split(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("../saved", "..", "/tmp", "a/../../saved", 3):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        for name in (str(folder), f"{folder}:{split}"):
            with pytest.raises(DataError, match=r"dataset_dict\.json names .* own folder only|no such file"):
                load_preferences(Data(name))


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"_data_files": "x"}']
)
def test_a_damaged_file_of_a_saved_dataset_is_a_data_error(saved: Path, file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    if file == "state.json":
        with pytest.raises(DataError, match="cannot be read as a saved dataset"):
            load_preferences(Data(str(saved)))
    else:
        try:
            assert len(load_preferences(Data(str(saved))).train) == 3
        except DataError as error:
            assert "cannot be read as a saved dataset" in str(error)


def test_a_pickle_in_a_saved_dataset_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    code = "cos\nsystem\n(S'touch " + str(tmp_path / "ran") + "'\ntR."
    edit(saved / "state.json", _fingerprint=code, _format_kwargs={"pickle": code})
    (saved / "data.pkl").write_text(code)
    with contextlib.suppress(DataError):
        load_preferences(Data(str(saved)))
    assert not (tmp_path / "ran").exists()


def test_invalid_text_in_a_saved_dataset_is_refused_with_its_row(saved: Path) -> None:
    texts = pa.array([b"a", b"\xe9", b"c"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["x", "y", "z"], "chosen": texts, "rejected": ["1", "2", "3"]})
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"saved row 2: invalid UTF-8"):
        load_preferences(Data(str(saved)))


def test_an_image_column_opens_no_file_that_a_cell_names(tmp_path: Path) -> None:
    place = str(tmp_path / "secret.png")
    table = pa.Table.from_pylist([{**row, "image": {"bytes": None, "path": place}} for row in ROWS])
    features = datasets.Features({name: datasets.Value("string") for name in ROWS[0]})
    dataset = datasets.Dataset(table.cast(table.schema)).cast(
        datasets.Features({**features, "image": datasets.Image()})
    )
    assert [row["image"] for _, row in rows_of(dataset)] == [{"path": place}] * 3  # type: ignore[index]


def test_json_columns_are_read_as_the_values_they_hold() -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "n": 1}]
    other = [conversation[0], {"role": "assistant", "content": "b", "n": "one"}]
    rows = {"chosen": [conversation], "rejected": [other]}
    dataset = datasets.Dataset.from_dict(rows, on_mixed_types="use_json")
    assert [row for _, row in rows_of(dataset)] == [{"chosen": conversation, "rejected": other}]


def test_links_are_followed_because_the_hub_cache_consists_of_them(tmp_path: Path, saved: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    os.rename(saved / "data-00000-of-00001.arrow", blobs / "abc")
    (saved / "data-00000-of-00001.arrow").symlink_to("../blobs/abc")
    assert len(load_preferences(Data(str(saved))).train) == 3
    pq.write_table(TABLE, blobs / "def")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.parquet").symlink_to("../blobs/def")
    assert len(load_preferences(Data(str(tmp_path / "snapshot"))).train) == 3


def test_a_script_beside_the_data_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    script = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("pairs.py", "dataset.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(script)
    with pytest.raises(DataError, match="holds no data files"):
        load_preferences(Data(str(folder)))
    pq.write_table(TABLE, folder / "train.parquet")
    assert len(load_preferences(Data(str(folder))).train) == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "metadata", [b"{", b"[" * 100_000, b'{"info": {"features": {"prompt": 3}}}', b"\xff"]
)
def test_what_a_table_says_of_its_features_is_not_read(tmp_path: Path, metadata: bytes) -> None:
    table = TABLE.replace_schema_metadata({b"huggingface": metadata, b"pandas": metadata})
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert len(load_preferences(Data(str(tmp_path / "pairs.parquet"))).train) == 3


def test_a_pickled_extension_type_is_not_loaded(tmp_path: Path) -> None:
    code = f"cos\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.".encode()
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
    schema = pa.schema([field.with_metadata(extension) for field in TABLE.schema])
    table = TABLE.cast(schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        assert len(load_preferences(Data(str(tmp_path / name))).train) == 3
    assert not (tmp_path / "ran").exists()


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["p"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    with pa.ipc.new_file(tmp_path / "pairs.arrow", table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "pairs.parquet")
    for name in ("pairs.arrow", "pairs.parquet"):
        with pytest.raises(DataError, match="the schema names 'chosen' more than once"):
            load_preferences(Data(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": '[{"name": "a", "name": "b"}]'}, "malformed tools: duplicate key 'name'"),
        ({"chat_template_kwargs": '{"a": 1, "a": 2}'}, "malformed chat_template_kwargs: duplicate key 'a'"),
        ({"tools": "[" * 100_000}, "malformed tools: nested too deeply"),
        ({"tools": "[] []"}, "malformed tools: text after the value"),
    ],
)
def test_json_inside_text_is_read_as_strictly_as_a_file(
    tmp_path: Path, row: dict[str, str], reason: str
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**ROWS[0], **row}))
    with pytest.raises(DataError, match=f"pairs.jsonl row 1: {reason}"):
        load_preferences(Data(str(tmp_path / "pairs.jsonl")))


def test_a_key_twice_in_a_csv_cell_is_refused(tmp_path: Path) -> None:
    cell = '"[{""role"": ""user"", ""content"": ""a"", ""content"": ""b""}]"'
    (tmp_path / "pairs.csv").write_text(f"prompt,chosen,rejected\n{cell},a,b\n")
    with pytest.raises(DataError, match=r"pairs.csv row 1: malformed JSON: duplicate key 'content'"):
        load_preferences(Data(str(tmp_path / "pairs.csv")))


def test_a_list_of_rows_stands_in_an_object(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('x "data": [' + json.dumps(ROWS[0]) + "]}")
    with pytest.raises(DataError, match="row 1: malformed JSON"):
        load_preferences(Data(str(tmp_path / "pairs.json")))


def test_a_hundred_thousand_columns_are_compared_at_once(tmp_path: Path) -> None:
    columns = [f"c{n}" for n in range(100_000)]
    (tmp_path / "a.csv").write_text(",".join([*columns, "c9"]) + "\n")
    (tmp_path / "a.jsonl").write_text("{" + ", ".join(f'"{name}": 1' for name in [*columns, "c9"]) + "}")
    for name in ("a.csv", "a.jsonl"):  # a square of this number would take minutes
        with pytest.raises(DataError, match="'c9'"):
            load_preferences(Data(str(tmp_path / name)))
