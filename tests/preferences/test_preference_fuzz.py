"""Whatever a file holds, its rows are accepted or refused with a `DataError`; nothing else comes out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import small_tokenizer
from hostile_files import FORMATS, Case, check, files, in_memory, junk_rows, messages, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.errors import DataError
from lora_dpo.preferences import Preference, load_demonstrations, load_preferences, load_ratings
from lora_dpo.recipe import Data
from lora_dpo.tokenization import ChatTokenizer

FUZZ = settings(max_examples=250, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load_or_refuse(train: Any, **data: Any) -> list[Preference]:
    """The pairs, or none where the data are refused as they should be."""
    pairs: list[Preference] = []
    for load in (load_preferences, load_demonstrations, load_ratings):
        try:
            loaded = load(Data(train, **data))
        except DataError:
            pass
        else:
            pairs += [record for record in loaded.train if isinstance(record, Preference)]
    return pairs


@FUZZ
@given(row=junk_rows, as_text=st.booleans())
def test_any_json_row_is_accepted_or_refused(
    rows_file: Callable[[list[Any]], str], row: dict[str, Any], as_text: bool
) -> None:
    for record in load_or_refuse(rows_file([row]), format="text" if as_text else "auto"):
        assert record.chosen != record.rejected
        if not as_text:
            assert record.prompt[-1]["role"] in ("user", "tool")  # type: ignore[index]
            for side in (record.chosen, record.rejected):
                assert side[0]["role"] == side[-1]["role"] == "assistant"  # type: ignore[index]
        json.dumps([record.prompt, record.chosen, record.rejected], ensure_ascii=False).encode()


@FUZZ
@given(row=st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), st.lists(messages), min_size=2))
def test_any_list_of_messages_is_accepted_or_refused(
    rows_file: Callable[[list[Any]], str], row: dict[str, Any]
) -> None:
    load_or_refuse(rows_file([row]))


GOOD = b'{"prompt": "caf\xc3\xa9", "chosen": "yes", "rejected": "no"}'
_json_like = st.lists(
    st.sampled_from(
        [*(bytes([c]) for c in b'{}[],:"\\\n \r\x00\xff'), GOOD, b'"data"', b"null", b"1e999", b"NaN"]
    ),
    max_size=12,
).map(b"".join)


@FUZZ
@given(
    content=st.binary(max_size=40) | _json_like,
    ending=st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".arrow", ".jsonl.gz"]),
    zipped=st.booleans(),
)
def test_any_bytes_are_accepted_or_refused(folder: Path, content: bytes, ending: str, zipped: bool) -> None:
    file = folder / f"pairs{ending}"
    file.write_bytes(gzip.compress(content) if zipped and ending.endswith(".gz") else content)
    for on_bad_row in ("stop", "skip"):
        load_or_refuse(str(file), on_bad_row=on_bad_row)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_tables_are_accepted_or_refused(folder: Path, tables: dict[str, bytes], flips: Any) -> None:
    for ending, content in tables.items():
        damaged = bytearray(content)
        for place, value in flips:
            damaged[place % len(damaged)] = value
        file = folder / f"damaged{ending}"
        file.write_bytes(damaged)
        load_or_refuse(str(file))


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([json.loads(GOOD)] * 3)
    pq.write_table(table, folder / "good.parquet")
    with pa.ipc.new_file(folder / "good.arrow", table.schema) as writer:
        writer.write_table(table)
    return {
        ".parquet": (folder / "good.parquet").read_bytes(),
        ".arrow": (folder / "good.arrow").read_bytes(),
        ".jsonl.gz": gzip.compress(GOOD),
    }


@given(
    nesting=st.sampled_from([50, 500, 900, 990, 5_000, 200_000]),
    inside=st.sampled_from(["prompt", "extra", "tools"]),
)
@settings(max_examples=18, deadline=None, derandomize=True)
def test_deep_nesting_is_accepted_or_refused(folder: Path, nesting: int, inside: str) -> None:
    deep = "[" * nesting + "]" * nesting
    message = f'{{"role": "user", "content": "hi", "extra": {deep}}}' if inside == "extra" else '"hi"'
    columns = {"prompt": f"[{message}]" if inside == "extra" else message, "chosen": '"a"', "rejected": '"b"'}
    if inside != "extra":
        columns[inside] = deep
    line = "{" + ", ".join(f'"{key}": {value}' for key, value in columns.items()) + "}"
    for name, content in (("deep.jsonl", line), ("deep.json", f"[{line}]")):
        (folder / name).write_text(content)
        load_or_refuse(str(folder / name))


ANY_SOURCE = st.one_of(
    *(files(ending, zipped) for ending in FORMATS for zipped in (False, True)), in_memory(), saved()
)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(small_tokenizer(), max_tokens=256)


@settings(FUZZ, max_examples=150)
@given(case=ANY_SOURCE, load=st.integers(0, 2), text=st.booleans())
def test_any_source_is_accepted_whole_or_refused(
    folder: Path, tokenizer: ChatTokenizer, case: Case, load: int, text: bool
) -> None:
    """`tests/stress/fuzz_data.py` does thousands of these."""
    verdict = check(case, load, text, folder / "any", tokenizer, seconds=30)
    assert not verdict.problem, verdict.detail
