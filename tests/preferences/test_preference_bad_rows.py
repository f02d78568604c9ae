"""Every kind of bad row is refused with its file, row, reason and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.errors import DataError
from lora_dpo.preferences import BadRowError, describe_skipped, load_demonstrations, load_preferences
from lora_dpo.recipe import Data

GOOD = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SAID = "\n\nHuman: hi\n\nAssistant:"
DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]

BAD = {
    "missing rejected": [
        {"prompt": "hi", "chosen": "yes"},
        {"prompt": "hi", "chosen": "yes", "rejected": None},
        {"chosen": [HI, YES]},
    ],
    "missing chosen": [{"instruction": "hi", "rejected": "no"}],
    "missing prompt": [{"chosen": "yes", "rejected": "no"}],
    "unknown columns": [{}, {"text": "hello"}, {"messages": [HI, YES]}, {"prompt": "hi"}],
    "empty response": [
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": " \n"},
        {"chosen": f"{SAID} yes", "rejected": SAID},
        {"prompt": "hi", "chosen": [YES], "rejected": [{"role": "assistant", "content": ""}]},
    ],
    "empty prompt": [{**GOOD, "prompt": ""}, {"instruction": " ", "chosen": "a", "rejected": "b"}],
    "identical sides": [
        {**GOOD, "rejected": "yes"},
        {"chosen": [HI, YES], "rejected": [HI, YES]},
        {"chosen": f"{SAID} a", "rejected": f"{SAID} a"},
    ],
    "roles out of order": [
        {**GOOD, "prompt": []},
        {**GOOD, "prompt": [{"role": "system", "content": "s"}]},
        {**GOOD, "prompt": [HI, HI]},
        {**GOOD, "prompt": [HI, YES]},
        {**GOOD, "prompt": [YES, HI]},
        {**GOOD, "prompt": [HI, {"role": "system", "content": "s"}]},
        {**GOOD, "prompt": [{"role": "tool", "content": "s"}]},
        {**GOOD, "prompt": [{"role": "system", "content": "s"}, HI], "system": "other"},
        {**GOOD, "chosen": [YES, HI]},
        {**GOOD, "chosen": [YES, NO]},
        {**GOOD, "chosen": []},
        {"chosen": f"\n\nHuman: a\n\nHuman: b{SAID} x", "rejected": f"\n\nHuman: a\n\nHuman: b{SAID} y"},
    ],
    "prompts differ": [
        {"chosen": [HI, YES], "rejected": [{"role": "user", "content": "ho"}, NO]},
        {"chosen": [HI, YES], "rejected": []},
        {"chosen": f"{SAID} yes", "rejected": "\n\nHuman: ho\n\nAssistant: no"},
        {"prompt": "ho", "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": "hi", "chosen": [HI, YES], "rejected": [NO]},
    ],
    "not a transcript": [{"chosen": f"{SAID} yes", "rejected": "no"}],
    "content is not text": [
        {**GOOD, "chosen": 3},
        {**GOOD, "prompt": 1.5},
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {**GOOD, "prompt": [{"role": "user"}]},
        {**GOOD, "system": 3},
        {"instruction": ["do"], "chosen": "a", "rejected": "b"},
    ],
    "not a message": [{**GOOD, "chosen": ["yes"]}],
    "unknown role": [
        {**GOOD, "chosen": [{"role": "gpt", "content": "a"}]},
        {**GOOD, "prompt": [{"from": "alien", "value": "a"}]},
        {**GOOD, "prompt": [{"content": "a"}]},
    ],
    "invalid Unicode": [
        {**GOOD, "chosen": "a\ud800"},
        {**GOOD, "prompt": [{**HI, "name": ["\udfff"]}]},
        {**GOOD, "tools": [{"name": "\ud800"}]},
    ],
    "nested too deeply": [{**GOOD, "prompt": [{**HI, "extra": DEEP}]}],
    "malformed tools": [{**GOOD, "tools": "{"}, {**GOOD, "tools": ["get"]}],
    "malformed chat_template_kwargs": [{**GOOD, "chat_template_kwargs": "[1]"}],
    "malformed tool call": [
        {"conversations": [{"from": "function_call", "value": "get()"}], "chosen": "a", "rejected": "b"},
        {**GOOD, "chosen": [{**YES, "tool_calls": "get"}]},
    ],
    "malformed history": [{"instruction": "hi", "history": ["a"], "chosen": "a", "rejected": "b"}],
    "all responses have the same score": [{"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}],
    "fewer than two responses": [
        {"prompt": "hi", "responses": ["a"], "scores": [1]},
        {"prompt": "hi", "responses": "ab"},
    ],
    "missing score": [
        {"prompt": "hi", "responses": ["a", "b"]},
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1]},
        {"prompt": "hi", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": None}]},
    ],
    "score is not a number": [
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1, float("nan")]},
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1, "N/A"]},
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1, True]},
    ],
    "unknown label": [{"prompt": "hi", "response_0": "a", "response_1": "b", "preferred": "tie"}],
}
CASES = [(reason, row) for reason, rows in BAD.items() for row in rows]


@pytest.mark.parametrize(
    ("reason", "row"), CASES, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(CASES)]
)
def test_a_bad_row_stops_with_its_file_row_and_reason(
    tmp_path: Path, reason: str, row: dict[str, Any]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in (GOOD, GOOD, row, GOOD)))
    with pytest.raises(BadRowError) as caught:
        load_preferences(Data(str(file)))
    error = caught.value
    assert (error.file, error.row, error.reason) == (str(file), 3, reason)
    assert str(error).startswith(f"{file} row 3: {reason}")
    assert str(error).endswith("(data.on_bad_row=skip skips such rows and counts them)")
    loaded = load_preferences(Data(str(file), on_bad_row="skip"))
    assert len(loaded.train) == 3
    assert loaded.skipped == {reason: 1}
    assert describe_skipped(loaded) == [f"1 row skipped: {reason} (first: {file} row 3)"]


LINES = {
    "malformed JSON": [
        b'{"prompt": "hi", "chosen": "yes", "rejected": "no"',
        b"{'prompt': 'hi'}",
        b'{"prompt": "hi"} {"prompt": "ho"}',
        b'{"prompt": "hi", "chosen": "a", "chosen": "b", "rejected": "no"}',
        b'{"prompt": "a\x00b"}',
        b"[" * 100_000,
        b"1" * 10_000,
    ],
    "invalid UTF-8": [b'{"prompt": "caf\xe9", "chosen": "yes", "rejected": "no"}', b"\xff\xfe{"],
    "not an object": [b"null", b'["hi"]', b"NaN"],
}
BAD_LINES = [(reason, line) for reason, lines in LINES.items() for line in lines]


@pytest.mark.parametrize(("reason", "line"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_alone(tmp_path: Path, reason: str, line: bytes) -> None:
    file = tmp_path / "pairs.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(BadRowError, match=f"pairs.jsonl row 3: {reason}"):
        load_preferences(Data(str(file)))
    loaded = load_preferences(Data(str(file), on_bad_row="skip"))
    assert [record.where.row for record in loaded.train] == [1, 4]
    assert loaded.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("content", "row", "what"),
    [
        ("[{0}, {0}, {{'a': 1}}, {0}]", 3, "malformed JSON: .* at line 1"),
        ("[{0},\n {0}\n {0}]", 2, "expected ',' or ']' after row 2 at line 3"),
        ("[{0}, {0}", 2, "expected ',' or ']' after row 2"),
        ("[{0}, {0},", 3, "malformed JSON"),
        ("[{0}, {0}] x", 2, "text after the list"),
        ('{{"data": [{0}, nul]}}', 2, "malformed JSON"),
        ('{{"data": [{0}]', 1, "the object is not closed"),
        ('{{"data": [{0}], "x": nul}}', 1, "malformed JSON: after this row"),
        ("[{0}, " + "[" * 100_000, 2, "nested too deeply"),
        ("[{0}, " + "1" * 10_000 + "]", 2, "malformed JSON"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_broken_json_list_stops_at_its_row(
    tmp_path: Path, content: str, row: int, what: str, on_bad_row: Any
) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(content.format(json.dumps(GOOD)))
    with pytest.raises(BadRowError, match=rf"pairs.json row {row}: .*{what}"):
        load_preferences(Data(str(file), on_bad_row=on_bad_row))


def test_a_json_element_with_bad_bytes_or_duplicate_keys_is_refused_alone(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    good = json.dumps(GOOD).encode()
    twice = b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}'
    file.write_bytes(b"[" + b",".join([good, good.replace(b"yes", b"\xe9"), twice, good]) + b"]")
    with pytest.raises(BadRowError, match=r"pairs.json row 2: invalid UTF-8"):
        load_preferences(Data(str(file)))
    loaded = load_preferences(Data(str(file), on_bad_row="skip"))
    assert loaded.skipped == {"invalid UTF-8": 1, "malformed JSON": 1}
    assert [record.where.row for record in loaded.train] == [1, 4]


def test_nothing_usable_is_an_error_that_counts_the_reasons(rows_file: Callable[[list[Any]], str]) -> None:
    rows = [{"a": 1}, {"a": 1}, {**GOOD, "rejected": "yes"}]
    with pytest.raises(
        DataError, match=r"no usable row .*2 rows skipped: unknown columns .*1 row skipped: identical"
    ):
        load_preferences(Data(rows_file(rows), on_bad_row="skip"))


def test_unknown_columns_lists_those_seen_and_the_layouts_understood(
    rows_file: Callable[[list[Any]], str],
) -> None:
    with pytest.raises(BadRowError) as caught:
        load_preferences(Data(rows_file([{"Prompt": "hi", "good": "a"}])))
    for part in ("'Prompt', 'good'", "Alpaca (instruction", "ShareGPT (conversations", "Anthropic HH"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [HI]}, "roles out of order"),
        ({"messages": [HI, YES, HI]}, "roles out of order"),
        ({"messages": [YES]}, "roles out of order"),
        ({"prompt": "hi"}, "unknown columns"),
        ({"prompt": "hi", "completion": " "}, "empty response"),
    ],
)
def test_a_bad_demonstration_is_refused(
    rows_file: Callable[[list[Any]], str], row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRowError, match=f"row 1: {reason}"):
        load_demonstrations(Data(rows_file([row])))


def test_a_demonstration_needs_no_difference_between_the_sides(rows_file: Callable[[list[Any]], str]) -> None:
    loaded = load_demonstrations(Data(rows_file([{**GOOD, "rejected": "yes"}])))
    assert loaded.train[0].response == (YES,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing rejected"),
        ({"prompt": "p", "chosen": [YES], "rejected": "b"}, "content is not text"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical sides"),
        ({"prompt": "p", "chosen": "a", "rejected": "\t"}, "empty response"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "content is not text"),
    ],
)
def test_bad_text_is_refused(rows_file: Callable[[list[Any]], str], row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=f"row 1: {reason}"):
        load_preferences(Data(rows_file([row]), format="text"))
