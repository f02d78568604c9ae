"""JSON and JSONL, row by row, so that whatever is wrong is reported with its row.

A JSONL line stands alone: a bad one is refused and the next is read. A JSON list cannot be read past a syntax
error, so that one is raised at once, whatever data.on_bad_row says.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any

from lora_dpo.errors import DataError
from lora_dpo.preferences.records import BadRowError, RawRow, RefusalError, Where

WRAPPERS = ("data", "rows")
BOM = b"\xef\xbb\xbf"
_space = re.compile(r"[ \t\r\n]*")


class MalformedError(Exception):
    """The text at this place is not JSON."""


class DuplicateError(MalformedError):
    """It is JSON, but an object has a key twice, and one of the two values would be lost."""


class _Parser:
    """Python's JSON decoder, which would keep the last of several equal keys; this one tells."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._duplicate: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            self._duplicate = repeated(key for key, _ in pairs)[0]
        return result

    def read(self, text: str, start: int) -> tuple[object, int]:
        """The value that begins at `start` (or a `RefusalError` of it) and where it ends."""
        self._duplicate = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise MalformedError(f"{error.msg} at line {error.lineno} column {error.colno}") from None
        except RecursionError:
            raise MalformedError("nested too deeply") from None
        except ValueError as error:  # an integer with thousands of digits
            raise MalformedError(str(error)) from None
        if self._duplicate is not None:
            return RefusalError("malformed JSON", f"duplicate key {self._duplicate!r}"), end
        return value, end


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once, in their order."""
    return [name for name, count in Counter(names).items() if count > 1]


def parse(text: str) -> object:
    """The one JSON value that the text is. Raises MalformedError for anything else, duplicate keys too."""
    value, end = _Parser().read(text, skip_space(text, 0))
    if skip_space(text, end) < len(text):
        raise MalformedError("text after the value")
    if isinstance(value, RefusalError):
        raise DuplicateError(value.detail)
    return value


def skip_space(text: str, start: int) -> int:
    match = _space.match(text, start)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def read_jsonl(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """One row a line; blank lines count as lines and give no row."""
    parser = _Parser()
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        if content.strip():
            yield Where(name, number), _line(parser, content)


def _line(parser: _Parser, line: bytes) -> object:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RefusalError("invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}")
    try:
        value, end = parser.read(text, skip_space(text, 0))
    except MalformedError as error:
        # The place is within the line; "line 1" would contradict the row.
        return RefusalError("malformed JSON", str(error).replace("at line 1 column", "at column"))
    if (rest := skip_space(text, end)) < len(text):
        return RefusalError("malformed JSON", f"text after the value at column {rest + 1}")
    return value


def read_json(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """A list of rows, an object that holds one under "data" or "rows", a single row, or JSON lines."""
    content = stream.read()
    # Bytes that are no UTF-8 become surrogates, which no valid text holds, and are reported with their row.
    text = content.removeprefix(BOM).decode("utf-8", "surrogateescape")
    start = skip_space(text, 0)
    if start == len(text):
        raise DataError(f"{name}: the file is empty")
    document = _Document(text, name)
    if text[start] == "[":
        end = yield from document.elements(start)
        document.expect_end(end)
    elif text[start] == "{" and (found := document.find_list(start)) is not None:
        end = yield from document.elements(found)
        document.expect_object_end(end)
    elif document.is_one_object(start):
        yield from document.single(start)
    else:
        yield from read_jsonl(io.BytesIO(content), name)


class _Document:
    """The text of a JSON file and its parser; positions are indices into the text."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name
        self._parser = _Parser()
        self._row = 1

    def elements(self, start: int) -> Generator[RawRow, None, int]:
        """The rows of the list that opens at `start`; returns the position after its end."""
        position = skip_space(self._text, start + 1)
        if self._at(position) == "]":
            return position + 1
        while True:
            value, end = self._value(position)
            yield Where(self._name, self._row), self._checked(value, position, end)
            position = skip_space(self._text, end)
            if self._at(position) == "]":
                return position + 1
            if self._at(position) != ",":
                raise self._malformed(f"expected ',' or ']' after row {self._row}", position)
            position = skip_space(self._text, position + 1)
            self._row += 1

    def find_list(self, start: int) -> int | None:
        """Where the list under "data" or "rows" opens in the object at `start`, if there is one."""
        try:
            for key, position in self._members(start):
                if key in WRAPPERS and self._at(position) == "[":
                    return position
        except MalformedError:
            return None
        return None

    def is_one_object(self, start: int) -> bool:
        try:
            _, end = self._parser.read(self._text, start)
        except MalformedError:
            return False
        return skip_space(self._text, end) == len(self._text)

    def single(self, start: int) -> Iterator[RawRow]:
        value, end = self._value(start)
        yield Where(self._name, 1), self._checked(value, start, end)

    def expect_end(self, position: int) -> None:
        rest = skip_space(self._text, position)
        if rest < len(self._text):
            raise self._malformed("text after the list", rest)

    def expect_object_end(self, position: int) -> None:
        """After the list come other members, which are ignored, and the end of the object."""
        try:
            position = skip_space(self._text, position)
            if self._at(position) == ",":
                for key, start in self._members(position):
                    if key in WRAPPERS and self._at(start) == "[":
                        raise DataError(f"{self._name}: holds more than one list of rows")
                    _, position = self._parser.read(self._text, start)
                    position = skip_space(self._text, position)
        except MalformedError as error:
            raise BadRowError(
                Where(self._name, self._row), "malformed JSON", f"after this row: {error}"
            ) from None
        if self._at(position) != "}":
            raise self._malformed("the object is not closed", position)
        self.expect_end(position + 1)

    def _members(self, start: int) -> Iterator[tuple[object, int]]:
        """Keys and the positions of their values, from the '{' or ',' at `start` to the object's end."""
        position = skip_space(self._text, start + 1)
        while self._at(position) == '"':
            key, end = self._parser.read(self._text, position)
            end = skip_space(self._text, end)
            if self._at(end) != ":":
                raise MalformedError("expected ':'")
            value = skip_space(self._text, end + 1)
            yield key, value
            _, end = self._parser.read(self._text, value)
            position = skip_space(self._text, end)
            if self._at(position) != ",":
                return
            position = skip_space(self._text, position + 1)

    def _value(self, position: int) -> tuple[object, int]:
        try:
            return self._parser.read(self._text, position)
        except MalformedError as error:
            raise BadRowError(Where(self._name, self._row), "malformed JSON", str(error)) from None

    def _checked(self, value: object, start: int, end: int) -> object:
        try:
            self._text[start:end].encode("utf-8")
        except UnicodeEncodeError:
            return RefusalError("invalid UTF-8", "the row holds bytes that are no UTF-8")
        return value

    def _at(self, position: int) -> str:
        return self._text[position : position + 1]

    def _malformed(self, what: str, position: int) -> BadRowError:
        line = self._text.count("\n", 0, position) + 1
        return BadRowError(Where(self._name, self._row), "malformed JSON", f"{what} at line {line}")
