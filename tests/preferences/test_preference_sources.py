"""Folders, splits, hub ids and rows in memory; only a hub id touches the network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pytest

from lora_dpo.errors import DataError, RecipeError
from lora_dpo.preferences import load_preferences
from lora_dpo.preferences.sources import rows_of
from lora_dpo.recipe import Data, Source

datasets.disable_progress_bars()

ROWS = [{"prompt": f"p{number}", "chosen": "yes", "rejected": "no"} for number in range(5)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def rows_read(path: Any) -> list[dict[str, Any]]:
    loaded = load_preferences(Data(path, format="text"))
    return [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in loaded.train]


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(ROWS[2:]))
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS[:2]).encode())
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
    datasets.Dataset.from_list(ROWS[2:3]).to_parquet(data / "test_prefs.parquet")
    (tmp_path / "val").mkdir()
    datasets.Dataset.from_list(ROWS[3:]).to_csv(tmp_path / "val" / "x.csv")
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
    with pytest.raises(RecipeError, match="give one of its splits: train, test"):
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
    [
        *(
            "pairs.jsonl",
            "./pairs",
            "/no/such/pairs",
            "~/no/such",
            "~nobody-here/x",
            "pairs",
            "a/b/c",
            "a\nb/c",
        ),
        *("C:\\data\\pairs", "C:/x/pairs.json", "org/name:a:b:c", "org/pairs.jsonl", "\0", "x" * 5000),
    ],
)
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
