"""Ollama's side of a Modelfile, as far as the tests need it: its parser, and the templates written for it.

The parser goes by the rules of Ollama's parser/parser.go: a value ends at the first line break outside of
quotes, and characters that aren't printable are lost. Of Go's templates only what is written here is
understood; anything else is an error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

COMMANDS = {"from", "parameter", "template", "adapter"}


def parse(text: str) -> list[tuple[str, str]]:
    """(command, value) in order; a parameter's command is its name. Raises ValueError."""
    commands: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
            continue
        if text[at] == "#":
            at = (text + "\n").index("\n", at)
            continue
        name, at = _word(text, at)
        if name.lower() not in COMMANDS:
            raise ValueError(f"no command: {name}")
        if name.lower() == "parameter":
            name, at = _word(text, at)
        value, at = _value(text, at)
        commands.append((name.lower(), value))
    if not any(name == "from" for name, _ in commands):
        raise ValueError("no FROM line")
    return commands


def _word(text: str, at: int) -> tuple[str, int]:
    found = re.compile(r"([A-Za-z_0-9]+)[ \t]").match(text, at)
    if found is None:
        raise ValueError(f"no command at {text[at : at + 20]!r}")
    return found[1], found.end()


def _value(text: str, at: int) -> tuple[str, int]:
    held = ""
    for place in range(at, len(text)):
        letter = text[place]
        if letter in " \t\r\n":
            closed = _unquoted(held.strip())
            if closed is not None and letter in "\r\n":
                return closed, place
            held += letter
        elif letter.isprintable():
            held += letter
    closed = _unquoted(held.strip())
    if closed is None:
        raise ValueError("a quote is never closed")
    return closed, len(text)


def _unquoted(held: str) -> str | None:
    for quote in ('"""', '"'):
        if held.startswith(quote):
            whole = len(held) >= 2 * len(quote) and held.endswith(quote)
            return held[len(quote) : -len(quote)] if whole else None
    return held


def run(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama renders: messages of one role that follow each other joined, system messages in .System."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**message, "content": joined[-1]["content"] + "\n\n" + message["content"]}
        else:
            joined.append(dict(message))
    shown = [{"Role": message["role"], "Content": message["content"]} for message in joined]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    root = {"Messages": shown, "System": system}
    nodes, rest = _block(_pieces(template))
    assert rest is None
    return _Run(root).nodes(nodes, root)


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """("text", …) and ("action", …). Trim markers are not understood: nothing here may need them."""
    for n, part in enumerate(re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)):
        if n % 2 == 0:
            assert "{{" not in part, part
            if part:
                yield "text", part
        else:
            assert not part.startswith("-") and not part.endswith("-"), part
            yield "action", part.strip()


def _block(pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str | None]:
    """Nodes up to an `end` or `else`, which is returned; None at the end of the text."""
    nodes: list[Any] = []
    for kind, text in pieces:
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text == "else" or text.startswith("else "):
            return nodes, text
        elif text.startswith("if "):
            nodes.append(_branches(text[3:], pieces))
        elif text.startswith("range "):
            inner, closing = _block(pieces)
            assert closing == "end"
            nodes.append(("range", text[6:], inner))
        else:
            nodes.append(("action", text))
    return nodes, None


def _branches(condition: str, pieces: Iterator[tuple[str, str]]) -> Any:
    inner, closing = _block(pieces)
    assert closing is not None
    if closing == "end":
        return ("if", condition, inner, [])
    if closing == "else":
        other, closing = _block(pieces)
        assert closing == "end"
        return ("if", condition, inner, other)
    return ("if", condition, inner, [_branches(closing.removeprefix("else if "), pieces)])


class _Run:
    def __init__(self, root: dict[str, Any]):
        self.names: dict[str, Any] = {"$": root}

    def nodes(self, nodes: list[Any], dot: Any) -> str:
        return "".join(self.node(node, dot) for node in nodes)

    def node(self, node: Any, dot: Any) -> str:
        kind, text = node[0], node[1]
        if kind == "text":
            return text
        if kind == "if":
            return self.nodes(node[2] if self.value(text, dot) else node[3], dot)
        if kind == "range":
            return self.range(text, node[2], dot)
        set_to = re.fullmatch(r"(\$\w+) (:?=) (.*)", text)
        if set_to:
            assert (set_to[1] in self.names) == (set_to[2] == "=") or set_to[1] == "$last", text
            self.names[set_to[1]] = self.value(set_to[3], dot)
            return ""
        shown = self.value(text, dot)
        assert isinstance(shown, str), text
        return shown

    def range(self, text: str, inner: list[Any], dot: Any) -> str:
        names = re.fullmatch(r"(\$\w+), (\$\w+) := (.*)", text)
        assert names is not None, text
        made = ""
        for n, item in enumerate(self.value(names[3], dot)):
            self.names[names[1]], self.names[names[2]] = n, item
            made += self.nodes(inner, item)
        return made

    def value(self, text: str, dot: Any) -> Any:
        words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)
        value = self.call(words, dot)
        assert not words, text
        return value

    def call(self, words: list[str], dot: Any) -> Any:
        name = words[0]
        if name not in ("eq", "ne", "not", "and", "len", "slice"):
            return self.term(words, dot)
        words.pop(0)
        given = []
        while words and words[0] != ")":
            given.append(self.term(words, dot))
        if name == "and":
            return next((value for value in given if not value), given[-1])
        functions = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "not": lambda a: not a,
            "len": len,
            "slice": lambda items, start: items[start:],
        }
        return functions[name](*given)

    def term(self, words: list[str], dot: Any) -> Any:
        word = words.pop(0)
        if word == "(":
            value = self.call(words, dot)
            assert words.pop(0) == ")"
            return value
        if word.startswith('"'):
            return ast.literal_eval(word)  # the escapes used are Python's too
        if word in ("true", "false"):
            return word == "true"
        if word.isdecimal():
            return int(word)
        name, *fields = word.split(".")
        value = self.names[name] if name.startswith("$") else dot
        assert name.startswith("$") or not name, word
        for field in fields:
            value = value[field]
        return value
