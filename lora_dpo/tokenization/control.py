"""Control strings: what content may never turn into, and marks that keep content and template apart.

A tokenizer's added tokens are matched as strings before anything else, so a user who types `<|im_end|>`
would end a turn. Every added token counts as a control string, except those that stand for plain text:
whitespace, words (a vocabulary somebody extended), and the HTML tags of Gemma's vocabulary. In assistant
turns the model's own tools of speech are allowed: added tokens that are not special and not part of the
turn structure, such as `<think>` or `<tool_call>`. What tokenizers call special varies and proves nothing:
whatever the template writes, and whatever has the form of a turn's frame, is structure as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_HTML = "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|sub|sup|code"
_PLAIN = re.compile(rf"[\w\s▁]+|</?(?:{_HTML})>")
_SPEECH = re.compile(r"think|thought|reason|tool|function", re.IGNORECASE)
_SPOKEN = re.compile(
    r"think|thought|reason|(tool|function)[\W_]?(calls?|sep)(?![a-z])|(?<![a-z])arg", re.IGNORECASE
)
"""Strings that an assistant itself writes to reason and to call tools; results of tools are not its own."""
_FRAME = re.compile(
    r"<[|\uff5c].*|.*[|\uff5c]>|\[/?[A-Z_ ]+\]|<</?\w+>>|</?s>"
    r"|<(bos|eos|pad|unk|mask|cls|sep)>|<(unused|reserved)\w*>"
    r"|</?\W*(system|developer|user|human|assistant|bot|model|observation)\W*>"
    r"|.*(tool|function|(start|begin|end)[\W_]?of).*",
    re.IGNORECASE,
)
"""What strings of the turn structure look like in the designs that are in use."""
_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
_NO_LETTER_BEFORE = r"(?<!\w)"
_NAME_LIKE = re.compile(r"[\w.:/\-]*")
_STRUCTURE_KEYS = frozenset({"role", "type", "id", "tool_call_id"})


class ControlStrings:
    """The control strings of one tokenizer.

    ids: string → token id. pattern: matches any of them, the longest first. special: those the tokenizer
    calls so. allowed: those that assistant content may hold, which is exact once `set_structure` has been
    told what the template writes. unbreakable: those of one character, which no mark can split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        control = {text: x for text, x in added.items() if x[1].special or not _PLAIN.fullmatch(text)}
        self.ids: dict[str, int] = {text: index for text, (index, _) in control.items()}
        self._single_word = frozenset(text for text, (_, token) in control.items() if token.single_word)
        self.special = frozenset(text for text, (_, token) in control.items() if token.special)
        self.unbreakable = frozenset(text for text in control if len(text) == 1)
        self.pattern = self._matcher(self.ids)
        # A breaker is no letter: right after one, what must not follow a letter can begin.
        self._after_breaker = re.compile(self.pattern.pattern.replace(_NO_LETTER_BEFORE, ""))
        self.set_structure(())

    def set_structure(self, written: Iterable[str]) -> None:
        """Take back from assistant content what the template writes around turns, as DeepSeek's `<User>`,
        and what could stand in its place, as Phi's `<|system|>`, which only some conversations show.
        """
        framing = {text for text in self.ids if _FRAME.fullmatch(text)}
        structure = {text for text in framing.union(written) if not _SPOKEN.search(text)}
        self.allowed = frozenset(self.ids) - self.special - structure
        self._allowed_pattern = self._matcher(self.allowed)

    def ends_turns(self, text: str) -> bool:
        """Whether control string `text` can be an end-of-turn: no tag of reasoning or of a tool call can."""
        return text not in self.allowed and not _SPEECH.search(text)

    def break_up(self, content: str, breaker: str) -> str:
        """Content with `breaker` inside every control string, overlapping ones too."""
        pieces, done = [], 0
        found = self.pattern.search(content)
        while found:
            cut = found.start() + 1
            pieces += [content[done:cut], breaker]
            done = cut
            found = self._after_breaker.match(content, cut) or self.pattern.search(content, cut + 1)
        return "".join([*pieces, content[done:]])

    def split_allowed(self, content: str) -> list[str]:
        """Content around the strings allowed to assistants: text at even places, such strings at odd ones."""
        return self._allowed_pattern.split(content)

    def touches(self, content: str) -> bool:
        """Whether `content` holds a control string, or an edge that its neighbours could complete to one."""
        if self.pattern.search(content):
            return True
        core, sizes = content.strip(), range(1, self._longest)
        return any(core[-size:] in self._beginnings or core[:size] in self._ends for size in sizes)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.ids), default=0)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(text[:size] for text in self.ids for size in range(1, len(text)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(text[size:] for text in self.ids for size in range(1, len(text)))

    def _matcher(self, texts: Iterable[str]) -> re.Pattern[str]:
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        words = (self._one(text) for text in longest_first)
        return re.compile("(" + ("|".join(words) or "(?!)") + ")")

    def _one(self, text: str) -> str:
        return (
            rf"{_NO_LETTER_BEFORE}{re.escape(text)}(?!\w)" if text in self._single_word else re.escape(text)
        )


class Marker:
    """Marks the content of one conversation with private-use characters that occur nowhere in it.

    breaker: splits control strings, and stands at the edges of all content that isn't a response's. probe:
    free for the caller. own: one character for each message of the response, at the edges of its content.
    pattern: matches any of them. escaped: how they look in ASCII JSON.
    """

    def __init__(self, controls: ControlStrings, conversation: Any, response_messages: int) -> None:
        used = set(_PRIVATE.findall("".join(strings(conversation))))
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        self.breaker, self.probe = next(free), next(free)
        self.own = tuple(next(free) for _ in range(response_messages))
        marks = (self.breaker, self.probe, *self.own)
        self.pattern = re.compile("[" + "".join(marks) + "]")
        self.escaped = tuple(json.dumps(mark).strip('"') for mark in marks)
        self._controls = controls

    def message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """A copy of `message` with marks at the edges of every text, tool calls included."""
        return self._walk(message, mark, message.get("role") == "assistant", names_too=True)

    def settings(self, value: Any) -> Any:
        """A copy of tools or template arguments. Names in them are left alone: templates compare those."""
        return self._walk(value, self.breaker, assistant=False, names_too=False)

    def _walk(self, value: Any, mark: str, assistant: bool, names_too: bool) -> Any:
        if isinstance(value, str):
            if not names_too and _NAME_LIKE.fullmatch(value):
                return self._controls.break_up(value, self.breaker)
            return self._text(value, mark, assistant)
        if isinstance(value, Mapping):
            return {
                self._key(key): self._walk(item, mark, assistant, names_too and key not in _STRUCTURE_KEYS)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._walk(item, mark, assistant, names_too) for item in value]
        return value

    def _key(self, key: Any) -> Any:
        return self._controls.break_up(key, self.breaker) if isinstance(key, str) else key

    def _text(self, text: str, mark: str, assistant: bool) -> str:
        pieces = self._controls.split_allowed(text) if assistant else [text]
        return "".join(piece if place % 2 else self._wrap(piece, mark) for place, piece in enumerate(pieces))

    def _wrap(self, piece: str, mark: str) -> str:
        """Marks go inside surrounding whitespace, so that a template's `trim` still finds it."""
        core = piece.strip()
        if not core:
            return piece
        start = len(piece) - len(piece.lstrip())
        core_marked = mark + self._controls.break_up(core, self.breaker) + mark
        return piece[:start] + core_marked + piece[start + len(core) :]


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
