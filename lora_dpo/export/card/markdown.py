"""Markdown from strings that may be anybody's: nothing in them becomes a link, HTML or a column."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_TAME = re.compile(r"[\w ./:+=,@%()~'-]*")
"""What means nothing between backticks, in a table or out of it."""


def code(text: object) -> str:
    """Text as inline code on one line, literal anywhere in Markdown, table cells included."""
    line = printable(" ".join(str(text).split()))
    if not line:
        return ""
    if _TAME.fullmatch(line):
        return f"`{line}`"
    # Between backticks a table would still split at |; as entities nothing is read as anything.
    return f"<code>{plain(line)}</code>"


def plain(text: str) -> str:
    """Text on one line, as it is: what Markdown or HTML could read as more than itself becomes an entity."""
    line = printable(" ".join(text.split()))
    line = re.sub(r"[\\`*_{}\[\]<>#|~&$!@]|:(?=//)|(?i:(?<=www))\.|^[-+=]", _entity, line)
    return re.sub(r"^\d+[.)]", lambda match: match[0][:-1] + f"&#{ord(match[0][-1])};", line)


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"


def printable(text: str) -> str:
    """Without control and direction characters, which would change how the rest is shown."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text.rstrip())}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are Markdown already, without | and line ends."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(summary: str, body: str) -> str:
    """A block that opens at a click. summary: without markup."""
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n\n{body}\n\n</details>"


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
