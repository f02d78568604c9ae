"""Data files as bad as they come, and a plain reader of its own for those that are accepted.

A `Case` is one source; `check` loads it as a run would and tells how that went.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import io
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from lora_dpo.errors import DataError, UserError
from lora_dpo.preferences import AnyRecord, BadRowError, load_demonstrations, load_preferences, load_ratings
from lora_dpo.preferences.conversations import SHAREGPT_ROLES
from lora_dpo.preferences.ranked import GRADES, LABELS, RANK_LISTS, RESPONSES, TEXTS
from lora_dpo.recipe import Data

LOADS: tuple[Callable[..., Any], ...] = (load_preferences, load_demonstrations, load_ratings)
FORMATS = ("json", "jsonl", "ndjson", "csv", "parquet", "arrow")
COLUMNS = [
    *("prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input", "history"),
    *("system", "question", "completion", "output", "tools", "chat_template_kwargs", "scores", "ratings"),
    *("response_0", "response_1", "text", "label", "weight", "margin", *RESPONSES, *LABELS, *RANK_LISTS),
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=8),
    st.sampled_from(["hi", "", " ", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "[{", "{}", "\ud800"]),
    st.sampled_from(["\0", "a\r\nb", "\u2028", "<|im_end|>", "caf\u00e9", "\ufeffx", "NaN", '"', "1e999"]),
)
speakers = st.sampled_from([*SHAREGPT_ROLES, "function_call"])
messages = st.one_of(
    st.fixed_dictionaries({"role": speakers, "content": texts}),
    st.fixed_dictionaries({"from": speakers, "value": texts}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": st.just([{"function": {"name": "f"}}])}
    ),
)
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    _leaves | messages | st.lists(messages, max_size=4),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from([*TEXTS, *GRADES, "role", "content", "rank"]) | texts, inner, max_size=3
        ),
    ),
    max_leaves=6,
)
junk_rows = st.dictionaries(st.sampled_from(COLUMNS), values, max_size=6)
_turns = st.builds(
    lambda pairs: [{"role": r, "content": c} for a, b in pairs for r, c in (("user", a), ("assistant", b))],
    st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1, max_size=3),
)
likely_rows = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
    st.fixed_dictionaries({"prompt": st.text(min_size=1), "chosen": st.text(), "rejected": st.text()}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans()}),
    st.fixed_dictionaries({"messages": _turns, "label": st.booleans()}),
    st.fixed_dictionaries({"chosen": _turns, "rejected": _turns}),
    st.fixed_dictionaries({"instruction": texts, "input": texts, "chosen": texts, "rejected": texts}),
)
_said = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: text + "x")
_pairs = st.tuples(_said, _said, _said)
good_rows = st.one_of(
    _pairs.map(lambda p: {"prompt": p[0], "chosen": p[1], "rejected": p[2] + "y"}),
    _pairs.map(lambda p: {"instruction": p[0], "input": p[1], "chosen": p[1], "rejected": p[2] + "y"}),
    _pairs.map(lambda p: {"prompt": _said_by("user", p[0]), "chosen": p[1], "rejected": p[2] + "y"}),
    _pairs.map(
        lambda p: {
            "chosen": _said_by("user", p[0]) + _said_by("assistant", p[1]),
            "rejected": _said_by("user", p[0]) + _said_by("assistant", p[2] + "y"),
        }
    ),
    _pairs.map(
        lambda p: {side: f"\n\nHuman: {p[0]}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    ),
)


def _said_by(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


any_rows = st.one_of(
    st.lists(good_rows, min_size=2, max_size=4),
    st.lists(good_rows, min_size=2, max_size=4),
    st.lists(good_rows | likely_rows | junk_rows, max_size=5),
)


def plain(rows: list[Any]) -> list[Any]:
    """Rows that UTF-8 can hold."""
    return json.loads(json.dumps(rows).encode().replace(b"\\ud", b"\\u0"))


# --- files -------------------------------------------------------------------------------------------------


def _lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _raw_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for r in rows)


def _csv(rows: list[Any]) -> bytes:
    """Every cell quoted; what is no text stands as its JSON."""
    header = sorted({key for row in rows for key in row}) or ["prompt"]
    table = [header, *([row.get(key, "") for key in header] for row in rows)]
    return b"".join(b",".join(map(_quoted, cells)) + b"\r\n" for cells in table)


def _quoted(cell: Any) -> bytes:
    text = cell if isinstance(cell, str) else json.dumps(cell)
    return b'"' + text.replace('"', '""').encode("utf-8", "surrogatepass") + b'"'


ODD_ARRAYS: list[pa.Array] = [
    pa.array([1, None, 3], pa.timestamp("us", "Europe/Paris")),
    pa.array([2**62, 1, None], pa.timestamp("s")),
    pa.array([1, 2, 3], pa.timestamp("us", "Mars/Olympus")),
    pa.array([2**31 - 1, 0, -(2**31)], pa.date32()),
    pa.array(["1.5", None, "2"]).cast(pa.decimal128(20, 2)),
    pa.array([b"\xff", b"a", None], pa.binary()),
    pa.array([b"\xff\xfe", b"ok", b"c"], pa.binary()).view(pa.string()),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([{"role": "user", "content": "a"}, None, {"role": None, "content": "c"}]),
    pa.array([[("a", 1), ("a", 2)], [], None], pa.map_(pa.string(), pa.int64())),
    pa.array([None, None, None]),
    pa.array([1, 2**63 - 1, None], pa.duration("ns")),
    pa.array([float("nan"), float("inf"), -0.0], pa.float32()),
    pa.array(["x", None, ""], pa.large_string()),
    pa.array(["x", "longer than twelve bytes", None], pa.string_view()),
    pa.array(['{"a": 1}', "{", None], pa.json_()),
    pa.array([(1, 2, 3)] * 3, pa.month_day_nano_interval()),
    pa.array([["a"], None, [None]], pa.list_view(pa.string())),
    pa.StructArray.from_arrays([pa.array(["a", "b", "c"])] * 2, ["role", "role"]),
    pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["r", "s"])),
    pa.array([[{"role": "user", "content": "q"}, {"role": "assistant", "content": t}] for t in "xyz"]),
]
tables = st.builds(
    lambda names, arrays: pa.table(list(arrays[: len(names)]), list(names[: len(arrays)])),
    st.lists(st.sampled_from(["prompt", "chosen", "rejected", "messages", "tools"]), min_size=2, max_size=5),
    st.lists(
        st.sampled_from([*ODD_ARRAYS, pa.array(["p", "q", "r"]), pa.array(["s", "t", "u"])]),
        min_size=2,
        max_size=5,
    ),
)


def _table_of(rows: list[Any]) -> pa.Table:
    try:
        return pa.Table.from_pylist(plain(rows))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # Arrow has one type for a column
        return pa.table({"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]})


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink)
    except (pa.ArrowException, OverflowError):  # some types have no place in Parquet
        return _parquet(pa.table({"prompt": ["p"], "chosen": ["a"], "rejected": ["c"]}))
    return sink.getvalue()


def _arrow(table: pa.Table, new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _deep(depth: int) -> bytes:
    return b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + b"[" * depth + b"]" * depth + b"}\n"


GOOD = {"prompt": "café", "chosen": "yes", "rejected": "no"}
HUGE_INTEGER = b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": 1' + b"0" * 5000 + b"}\n"
LARGEST_TOKENIZED = 4_000_000
"""The tokenizer itself takes seconds for each megabyte of a file."""
SPECIAL = {
    "empty": b"",
    "blank": b" \r\n\t\n\n",
    "integer of 5000 digits": HUGE_INTEGER,
    "NaN and Infinity": b'{"prompt": "p", "chosen": "a", "rejected": "b", "weight": NaN, "m": [-Infinity]}\n',
    "duplicate key": b'{"prompt": "p", "prompt": "q", "chosen": "a", "rejected": "b"}\n',
    "nested duplicate": b'{"chosen": [{"role": "user", "role": "tool"}], "rejected": "b"}\n',
    "lone surrogate": b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n',
    "two CRs": _lines([GOOD]).replace(b"\n", b"\r") * 2,
    "U+2028": _raw_lines([{**GOOD, "chosen": "a\u2028b\u2029c\x85d"}]),
    "UTF-16": _lines([GOOD]).decode().encode("utf-16"),
    "UTF-16 without BOM": _lines([GOOD]).decode().encode("utf-16-le"),
    "Latin-1": _raw_lines([GOOD]).decode().encode("latin-1"),
    "UTF-8 BOM": b"\xef\xbb\xbf" + _raw_lines([GOOD]),
    "two BOMs": b"\xef\xbb\xbf" * 2 + _raw_lines([GOOD]),
    "NUL": _lines([GOOD]).replace(b"a", b"\0"),
    "depth 500": _deep(500),
    "depth 100,000": _deep(100_000),
    "CSV, unbalanced": b'prompt,chosen,rejected\na,"b,c\n',
    "CSV, ragged": b"prompt,chosen,rejected\na,b\na,b,c,d\np,q,r\n",
    "CSV, quote inside": b'prompt,chosen,rejected\na"b,c"d,"e"f\n',
    "CSV, CR": b"prompt,chosen,rejected\ra,b,c\r",
    "CSV, duplicate key in a cell": b'chosen,rejected\n"[{""role"": ""user"", ""role"": ""tool""}]",b\n',
    "CSV, UTF-16": "prompt,chosen,rejected\na,b,c\n".encode("utf-16"),
    "no object before data": b'x "data": [{"prompt": "p", "chosen": "a", "rejected": "b"}]}',
}
LARGE = {
    "string of 10 MB": lambda: _lines([{**GOOD, "chosen": "word " * 2_000_000}]),
    "line of 10 MB of NUL": lambda: bytes(10_000_000),
    "100,000 columns": lambda: _lines([{**GOOD, **{f"c{n}": n for n in range(100_000)}}]),
    "100,000 keys, one twice": lambda: _lines([{f"c{n}": n for n in range(100_000)}])[:-2] + b', "c9": 1}\n',
    "CSV of 100,000 columns": lambda: b",".join(b"c%d" % n for n in range(100_000)) + b",prompt\n",
    "CSV field of 10 MB": lambda: b"prompt,chosen,rejected\na," + b"x y" * 3_300_000 + b",c\n",
    "300,000 control strings": lambda: _lines([{**GOOD, "chosen": "<|im_end|>" * 300_000}]),
}


@dataclass
class Case:
    """One source. kind: the row of the table it counts under. content: a file's bytes, None for odd things.

    rows: rows in memory, or of a saved dataset. odd: the name of a `PLACES` entry.
    """

    kind: str
    content: bytes | None = None
    rows: Any = None
    odd: str | None = None
    note: str = ""


@st.composite
def contents(draw: st.DrawFn, ending: str, large: bool = False) -> bytes:
    """What may stand in a file of this type: rows, then damage."""
    if large and draw(st.integers(0, 299)) == 157:
        return LARGE[draw(st.sampled_from(sorted(LARGE)))]()
    choice = draw(st.integers(0, 9))
    if choice == 0:
        return draw(st.binary(max_size=60))
    if choice in (1, 2) and ending not in ("parquet", "arrow"):
        special = SPECIAL[draw(st.sampled_from(sorted(SPECIAL)))]
        return draw(st.sampled_from([b"", _lines([GOOD])])) + special
    if ending in ("parquet", "arrow"):
        table = draw(tables) if choice < 5 else _table_of(draw(any_rows))
        arrow = draw(st.sampled_from([pa.ipc.new_file, pa.ipc.new_stream]))
        content = _parquet(table) if ending == "parquet" else _arrow(table, arrow)
    else:
        rows = draw(any_rows)
        write: Callable[[list[Any]], bytes] = {"csv": _csv, "json": _json}.get(ending, _lines)
        content = draw(st.sampled_from([write, write, _raw_lines if ending != "csv" else _csv]))(rows)
    return _damaged(draw, content) if choice >= 6 else content


def _json(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    how = draw(st.sampled_from(["cut", "insert", "flip", "double", "crlf", "encoding", "bom"]))
    if how == "cut":
        return content[:place]
    if how == "insert":
        inside = draw(
            st.sampled_from([b"\0", b"\xff", b"\xc3", b"\n", b"\r", b'"', b"{", b",", b"\xed\xa0\x80"])
        )
        return content[:place] + inside + content[place:]
    if how == "flip":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if how == "double":
        return content + content
    if how == "crlf":
        return content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\xe2\x80\xa8"])))
    if how == "bom":
        return draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])) + content
    text = content.decode("utf-8", "replace")
    return text.encode(draw(st.sampled_from(["utf-16", "utf-16-le", "latin-1", "utf-8-sig"])), "replace")


@st.composite
def files(draw: st.DrawFn, ending: str, zipped: bool, large: bool = False) -> Case:
    content = draw(contents(ending, large))
    kind = ending + (".gz" if zipped else "")
    if not zipped:
        return Case(kind, content)
    packed = gzip.compress(content, 1, mtime=0)
    how = draw(st.sampled_from(["whole", "whole", "parts", "cut", "flip", "raw", "tail"]))
    if how == "parts":
        middle = draw(st.integers(0, len(content)))
        packed = b"".join(gzip.compress(part, mtime=0) for part in (content[:middle], content[middle:]))
    elif how == "cut":
        packed = packed[: draw(st.integers(0, len(packed)))]
    elif how == "flip":
        place = draw(st.integers(0, len(packed) - 1))
        packed = packed[:place] + bytes([packed[place] ^ draw(st.integers(1, 255))]) + packed[place + 1 :]
    elif how == "raw":
        packed = content
    elif how == "tail":
        packed += draw(st.sampled_from([b"\0" * 9, b"tail", b"\x1f\x8b"]))
    return Case(kind, packed, note=how)


class Opaque:
    """An object that nothing can be done with."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


def _odd_objects() -> st.SearchStrategy[Any]:
    import datetime
    import decimal

    import numpy as np

    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return st.sampled_from(
        [
            *(10**5000, b"bytes", datetime.date(2024, 1, 1), decimal.Decimal("1.5"), np.array([1, 2])),
            *(np.array(["a"]), np.float32(1), np.int64(1), np.str_("text"), {1, 2}, cyclic, object, 1j),
            Opaque(),
        ]
    )


@st.composite
def in_memory(draw: st.DrawFn) -> Case:
    rows: list[Any] = draw(any_rows)
    for row in rows:
        for _ in range(draw(st.integers(0, 2))):
            odd = draw(_odd_objects())
            place = draw(st.sampled_from([*row, *COLUMNS]))
            inside = row.get(place)
            if isinstance(inside, list) and inside and isinstance(inside[0], dict) and draw(st.booleans()):
                inside[0][draw(st.sampled_from(["content", "tool_calls", "role", "x"]))] = odd
            else:
                row[place] = odd
    if draw(st.integers(0, 5)) == 0:
        rows.insert(0, draw(_odd_objects() | values))
    return Case("memory", rows=rows)


@st.composite
def saved(draw: st.DrawFn) -> Case:
    table = draw(tables) if draw(st.booleans()) else _table_of(draw(any_rows))
    state: Any = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "f",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info: Any = {}
    if draw(st.booleans()):
        odd = st.sampled_from([None, 1, "x", [], {}, "../x", [{"filename": "../../x.arrow"}], ["a"], "\0"])
        state[draw(st.sampled_from(sorted(state)))] = draw(odd)
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["Value", "Image", "Audio", "Json", "Nope", "Sequence", 3, None]))
        info = {
            "features": {"chosen": {"_type": kind, "dtype": draw(st.sampled_from(["string", "x", None]))}}
        }
    content = _arrow(table, pa.ipc.new_stream)
    if draw(st.integers(0, 3)) == 0:
        content = _damaged(draw, content)
    return Case("saved", content, rows=(state, info))


def _fifo(place: Path) -> Path:
    os.mkfifo(place / "data.jsonl")
    return place / "data.jsonl"


def _link(target: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "data.jsonl").symlink_to(target)
        return place / "data.jsonl"

    return make


def _folder(place: Path) -> Path:
    (place / "data.jsonl").mkdir()
    (place / "data.jsonl" / "x.csv").mkdir()
    return place / "data.jsonl"


def _folder_with_pipe(place: Path) -> Path:
    _fifo(place)
    (place / "a.jsonl").write_bytes(_lines([GOOD, {**GOOD, "prompt": "x"}]))
    return place


def _odd_name(place: Path) -> Path:
    name = os.fsencode(place) + b"/\xff\xfe caf\xe9\n.jsonl"
    Path(os.fsdecode(name)).write_bytes(_lines([GOOD, {"prompt": 1}]))
    return Path(os.fsdecode(name))


def _bomb(ending: str, piece: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        one = gzip.compress(piece * (2**22 // len(piece)), 9, mtime=0)
        (place / f"data.{ending}.gz").write_bytes(one * 16)  # 64 MiB of 65 KB
        return place / f"data.{ending}.gz"

    return make


PLACES: dict[str, Callable[[Path], Path]] = {
    "named pipe": _fifo,
    "folder with a named pipe": _folder_with_pipe,
    "device": _link("/dev/zero"),
    "link to itself": _link("data.jsonl"),
    "link to nothing": _link("nothing"),
    "link to a folder": _link("."),
    "folder named like a file": _folder,
    "name that is no UTF-8": _odd_name,
    "bomb, one line": _bomb("jsonl", b"\0" * 64),
    "bomb, rows": _bomb("jsonl", _lines([{**GOOD, "x": "x" * 3900}])),
    "bomb, JSON": _bomb("json", b"[" * 64),
    "bomb, one CSV field": _bomb("csv", b"x" * 64),
    "bomb, Parquet": _bomb("parquet", b"PAR1" * 16),
    "bomb, blank lines": _bomb("jsonl", b"\n" * 64),
}


# --- the plain reader --------------------------------------------------------------------------------------


def read_plainly(kind: str, content: bytes) -> dict[int, Any]:
    """Row number → row, of an accepted file, by other means than the package's."""
    ending = kind.removesuffix(".gz")
    if kind.endswith(".gz"):
        content = gzip.decompress(content)
    if ending in ("parquet", "arrow", "saved"):
        table = _plain_table(ending, content)
        return {n + 1: _plain_row(table.slice(n, 1)) for n in range(table.num_rows)}
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if ending == "csv":
        header, *records = _csv_records(text)
        return {n: dict(zip(header, cells, strict=False)) for n, cells in enumerate(records, start=1)}
    if ending == "json":
        with contextlib.suppress(ValueError):
            whole = json.loads(text)
            wrapped = [whole[key] for key in ("data", "rows") if isinstance(whole, dict) and key in whole]
            inside = next((value for value in wrapped if isinstance(value, list)), [whole])
            return dict(enumerate(whole if isinstance(whole, list) else inside, start=1))
    return {n: _loads(line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()}


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _plain_row(table: pa.Table) -> Any:
    try:
        return table.to_pylist()[0]
    except (ValueError, OverflowError):  # a value that Python has no text or number for
        return None


def _plain_table(ending: str, content: bytes) -> pa.Table:
    if ending == "parquet":
        return pq.read_table(io.BytesIO(content))
    opened = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    return opened(io.BytesIO(content)).read_all()


def _csv_records(text: str) -> list[list[str]]:
    """RFC 4180 with any line end, character by character."""
    records: list[list[str]] = []
    cells, cell, quoted, place, empty = [], [], False, 0, True
    while place < len(text):
        c = text[place]
        if quoted:
            if c == '"' and text[place + 1 : place + 2] == '"':
                cell.append('"')
                place += 1
            elif c == '"':
                quoted = False
            else:
                cell.append(c)
        elif c == '"' and not cell:
            quoted, empty = True, False
        elif c == ",":
            cells.append("".join(cell))
            cell, empty = [], False
        elif c in "\r\n":
            if not (empty and not cell and not cells):
                records.append([*cells, "".join(cell)])
            cells, cell, empty = [], [], True
        else:
            cell.append(c)
            empty = False
        place += 1
    if not (empty and not cell and not cells):
        records.append([*cells, "".join(cell)])
    return records


def strings_of(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > 100:
        return
    if isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ("[", "{"):  # a cell, tools or tool calls may be written as JSON
            with contextlib.suppress(ValueError, RecursionError):
                yield from strings_of(json.loads(value), depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key, depth + 1)
            yield from strings_of(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item, depth + 1)


def edits(record: AnyRecord, row: Any) -> str | None:
    """What in a record is not the row's own text, None if all of it is."""
    own = set(strings_of(row))
    joined = {row["instruction"] + "\n" + row["input"]} if _is_alpaca(row) else set()
    for name in ("prompt", "chosen", "rejected", "response"):
        side = getattr(record, name, None)
        if side is None:
            continue
        if isinstance(side, str):
            written = row.get(name)  # null is no text at all, as everywhere
            allowed = {"" if written is None else written} if name != "response" else own
            if side not in allowed:
                return f"{name}: {side!r}"
            continue
        for message in side:
            content = message["content"]
            if content in own or content in joined or content == "":
                continue
            # a transcript's turns, and a response to one, are parts of a text
            if not any("Human:" in text for text in own) or not any(content in text for text in own):
                return f"{name}: {content!r}"
    return None


def _is_alpaca(row: Any) -> bool:
    return isinstance(row.get("instruction"), str) and isinstance(row.get("input"), str)


# --- one example -------------------------------------------------------------------------------------------


class HangError(BaseException):
    """An example took too long; not an Exception, so that nothing in between can catch it."""


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raises HangError inside after `seconds`; ends the process where even that is not heard."""

    def alarm(*_: object) -> None:
        raise HangError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, alarm)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@dataclass
class Verdict:
    """How an example went. problem: "", "traceback", "hang" or "silent edit"."""

    accepted: bool = False
    problem: str = ""
    detail: str = ""
    records: list[Any] = field(default_factory=list)


def source_of(case: Case, folder: Path) -> Any:
    """Writes the case below `folder`, which is emptied first, and returns what data.train would name."""
    if case.content is None and case.odd is None:
        return iter(case.rows)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if case.odd is not None:
        return str(PLACES[case.odd](folder))
    assert case.content is not None
    if case.kind == "saved":
        state, info = case.rows
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text(json.dumps(info))
        (folder / "data-00000-of-00001.arrow").write_bytes(case.content)
        return str(folder)
    (folder / f"data.{case.kind}").write_bytes(case.content)
    return str(folder / f"data.{case.kind}")


def check(
    case: Case, load: int, text: bool, folder: Path, tokenizer: Any = None, seconds: float = 10.0
) -> Verdict:
    """Load a case with both ways of on_bad_row, compare what was accepted, tokenize it."""
    import traceback

    verdict = Verdict()
    try:
        with watchdog(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(case, load, text, folder, tokenizer, verdict)
    except HangError:
        verdict.problem, verdict.detail = "hang", traceback.format_exc()
    except Exception:
        verdict.problem, verdict.detail = "traceback", traceback.format_exc()
    return verdict


def _check(case: Case, load: int, text: bool, folder: Path, tokenizer: Any, verdict: Verdict) -> None:
    way = "text" if text else "auto"
    found: dict[str, Any] = {}
    for on_bad_row in ("stop", "skip"):
        source = source_of(case, folder)
        name = source if isinstance(source, str) else "dataset"
        try:
            data = Data("memory", format=way, on_bad_row=on_bad_row)
            object.__setattr__(data, "train", source)  # a recipe takes no other rows in memory than datasets
            found[on_bad_row] = LOADS[load](data)
        except DataError as error:
            found[on_bad_row] = None
            _check_refusal(error, name, on_bad_row, verdict)
    stopped, skipped = found["stop"], found["skip"]
    if stopped is not None and (skipped is None or skipped.skipped or skipped.train != stopped.train):
        verdict.problem, verdict.detail = "silent edit", "skip gives other records than stop"
    verdict.accepted = stopped is not None
    for loaded in filter(None, (stopped, skipped)):
        _compare(case, loaded, verdict)
    small = len(case.content or b"") < LARGEST_TOKENIZED
    if tokenizer is not None and small and (loaded := stopped or skipped):
        verdict.records = loaded.train
        _tokenize(loaded.train, tokenizer)


def _check_refusal(error: DataError, name: str, on_bad_row: str, verdict: Verdict) -> None:
    if name not in str(error) and "data.train" not in str(error):
        verdict.problem, verdict.detail = "traceback", f"the refusal does not name the source: {error}"
    if isinstance(error, BadRowError) and error.row < 1:
        verdict.problem, verdict.detail = "traceback", f"the refusal names no row: {error}"


def _compare(case: Case, loaded: Any, verdict: Verdict) -> None:
    if case.odd is not None:
        return
    if case.content is None:
        rows = dict(enumerate(case.rows, start=1))
    else:
        rows = read_plainly(case.kind, case.content)
    there = {record.where.row for record in loaded.train}
    if len(there) + sum(loaded.skipped.values()) != len(rows):
        counts = f"{len(there)} rows used, {sum(loaded.skipped.values())} skipped, {len(rows)} in the file"
        verdict.problem, verdict.detail = "silent edit", counts
    for record in loaded.train:
        edit = edits(record, rows[record.where.row])
        if edit is not None:
            verdict.problem, verdict.detail = "silent edit", f"{record.where}: {edit}"


def _tokenize(records: list[Any], tokenizer: Any) -> None:
    from lora_dpo.tokenization import tokenize

    with contextlib.suppress(UserError):
        tokenize(records, tokenizer, skip_refused=True)
    with contextlib.suppress(UserError):
        tokenize(records, tokenizer)
