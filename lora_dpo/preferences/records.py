"""What a usable row becomes, and what is raised for one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_dpo.errors import DataError

Message = dict[str, Any]
"""A chat message: "role" and "content" are always there; "tool_calls", "name" and others pass through."""

Messages = tuple[Message, ...]
Row = dict[str, Any]
"""Columns by name; a column whose value is None is taken as absent."""


@dataclass(frozen=True)
class Where:
    """A row's place: `row` counts records from 1 (in JSONL it is the line number, in CSV the header is not
    counted)."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses. prompt + chosen is the whole conversation of the chosen side.

    prompt ends with a user or tool message. Each response begins and ends with an assistant message and may
    have several turns. With data.format="text" all three are strings, taken verbatim.
    tools, template_kwargs: passed to the chat template. values: finite numbers for the objective, by name:
    weight (not negative) and margin, where the row has such columns.
    """

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    where: Where
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and one response to learn from (SFT); the fields are as in `Preference`."""

    prompt: Messages | str
    response: Messages | str
    where: Where
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rating:
    """A prompt and one response with a thumbs up (desirable) or down; the fields are as in `Preference`.

    values: weight, where the row has that column, and always desirable as 1.0 or 0.0. mismatched: another
    record's response, for KTO's estimate of the KL divergence (see `mismatched`); None until it is chosen.
    """

    prompt: Messages | str
    response: Messages | str
    desirable: bool
    where: Where
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    mismatched: Messages | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", {**self.values, "desirable": float(self.desirable)})


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, without an answer; the fields are as in `Preference`."""

    prompt: Messages | str
    where: Where
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


AnyRecord = Preference | Demonstration | Rating


class RefusalError(Exception):
    """Why a row cannot be used, before its place is known; `BadRowError` is what a user sees.

    reason: short and stable, rows are counted by it. detail: what was found in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadRowError(DataError):
    """A row that cannot be used: "{file} row {row}: {reason}: {detail}"."""

    def __init__(self, where: Where, reason: str, detail: str = "", hint: str = "") -> None:
        text = f"{where}: {reason}" + (f": {detail}" if detail else "") + (f" {hint}" if hint else "")
        super().__init__(text)
        self.where = where
        self.file = where.file
        self.row = where.row
        self.reason = reason
        self.detail = detail


RawRow = tuple[Where, "object | RefusalError"]
"""What readers give: a row as it was read, or why that row alone could not be read."""
