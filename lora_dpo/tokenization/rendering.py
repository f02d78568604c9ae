"""Chat template + conversation → text that knows its content from its own control strings.

The template is rendered twice, with marked and with unmarked content. Where the marks don't disturb it
(removing them gives the unmarked text) and content makes no control string, the unmarked text is the truth,
as it is for `apply_chat_template`. Where content does make one, the marked rendering is the truth: there
the template, too, took the content for text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_dpo.errors import DataError, ModelError
from lora_dpo.preferences import Message
from lora_dpo.preferences.conversations import ROLES
from lora_dpo.tokenization.control import ControlStrings, Marker, strings


@dataclass(frozen=True)
class Chat:
    """A conversation as the template gets it; messages from `response_start` on are the response."""

    messages: tuple[Message, ...]
    response_start: int
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Control:
    """One control string in a rendering: text[start : start + len(string)]."""

    start: int
    string: str

    @property
    def end(self) -> int:
        return self.start + len(self.string)


@dataclass(frozen=True)
class Reading:
    """A rendering with its marks removed.

    marks: mark → first and last place in `text`. controls: the control strings that no mark splits or
    touches from inside, in order: the template's own, and those allowed to assistants.
    clean: there are no others.
    """

    text: str
    marks: Mapping[str, tuple[int, int]]
    controls: tuple[Control, ...]
    clean: bool


class Template:
    """The tokenizer's chat template, or the one given: Jinja text or the path of a file with it.

    It runs in transformers' sandbox: it reaches no attribute, file or module of Python, and ranges end at
    100,000. What nothing there bounds is time and memory: loops in loops, or a text repeated without end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None) -> None:
        self._tokenizer = tokenizer
        self.text = _template_text(source) if source else None

    @property
    def exists(self) -> bool:
        return bool(self.text or self._tokenizer.chat_template)

    @property
    def source(self) -> str:
        """The Jinja text; of a tokenizer with several templates, all of them."""
        own: Any = self.text or self._tokenizer.chat_template or ""
        return own if isinstance(own, str) else "\n".join(map(str, own.values()))

    def render(self, chat: Chat, generation: bool) -> str:
        """The conversation as text. Raises ModelError without a template; what the template raises passes."""
        if not self.exists:
            raise ModelError(
                "the base model's tokenizer has no chat template: set data.chat_template (Jinja text or a"
                ' file), or data.format="text" for data that is already rendered'
            )
        rendered = self._tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=list(chat.tools) if chat.tools else None,  # pyright: ignore[reportArgumentType]
            chat_template=self.text,
            add_generation_prompt=generation,
            tokenize=False,
            **chat.template_kwargs,
        )
        assert isinstance(rendered, str)
        return rendered


class Rendering:
    """One conversation rendered and read, and parts of it in the same terms.

    whole: the reading. Raises DataError, naming `place`, where the template refuses the conversation.
    """

    def __init__(
        self, template: Template, controls: ControlStrings, chat: Chat, place: str, generation: bool = False
    ) -> None:
        self._template, self._controls, self._place, self._chat = template, controls, place, chat
        texts = (chat.messages, chat.tools, dict(chat.template_kwargs))
        _check_roles(chat.messages, place)
        _check_breakable(controls, texts, place)
        self._marker = Marker(controls, texts, len(chat.messages) - chat.response_start)
        self._shown = self._marked()
        plain = self._render(chat, generation)
        self.whole = self._read(self._render(self._shown, generation))
        if self.whole.text == plain:
            return
        if not any(controls.touches(text) for text in strings(texts)):
            # The template looks at content more closely than marks allow, and the content is harmless.
            self._shown = chat
            self.whole = self._read(plain)
        elif any(mark in self.whole.text for mark in self._marker.escaped):
            raise DataError(
                f"{place}: holds control strings, and the chat template escapes what keeps them apart"
            )

    @property
    def count(self) -> int:
        """How many messages there are."""
        return len(self._chat.messages)

    def place_of(self, index: int) -> tuple[int, int] | None:
        """Where the content of response message `index` begins and ends in whole.text, None if unknown."""
        return self.whole.marks.get(self._marker.own[index - self._chat.response_start])

    def leaves_out(self, index: int) -> bool:
        """Whether the template writes none of the text that response message `index` has."""
        own = self._marker.own[index - self._chat.response_start]
        return own not in self.whole.marks and any(
            own in text for text in strings(self._shown.messages[index])
        )

    def prefix(self, count: int, generation: bool) -> str | None:
        """The first `count` messages alone, None if the template refuses them."""
        return self._part(self._shown.messages[:count], generation)

    def header(self, count: int) -> str | None:
        """The first `count` messages, and what the template writes before an assistant's content then."""
        probe = {"role": "assistant", "content": self._marker.probe}
        text = self._part((*self._shown.messages[:count], probe), generation=False, keep=self._marker.probe)
        return text.partition(self._marker.probe)[0] if text and self._marker.probe in text else None

    def _part(self, messages: tuple[Message, ...], generation: bool, keep: str = "") -> str | None:
        if not messages:
            return None
        try:
            marked = self._template.render(replace(self._shown, messages=messages), generation)
        except ModelError:
            raise
        except Exception:  # a template raises whatever it likes
            return None
        return self._marker.pattern.sub(lambda mark: mark[0] if mark[0] == keep else "", marked)

    def _marked(self) -> Chat:
        chat, marker = self._chat, self._marker
        marks = (marker.breaker,) * chat.response_start + marker.own
        messages = (marker.message(*pair) for pair in zip(chat.messages, marks, strict=True))
        tools, template_kwargs = marker.settings(chat.tools), marker.settings(dict(chat.template_kwargs))
        return Chat(tuple(messages), chat.response_start, tools, template_kwargs)

    def _render(self, chat: Chat, generation: bool) -> str:
        try:
            return self._template.render(chat, generation)
        except ModelError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise DataError(f"{self._place}: the chat template refuses this conversation: {error}") from error

    def _read(self, marked: str) -> Reading:
        at = [mark.start() for mark in self._marker.pattern.finditer(marked)]
        text = self._marker.pattern.sub("", marked)
        marks: dict[str, tuple[int, int]] = {}
        for before, place in enumerate(at):
            first, _ = marks.get(marked[place], (place - before, 0))
            marks[marked[place]] = (first, place - before)
        find = self._controls.pattern.finditer
        controls = tuple(Control(m.start() - bisect_left(at, m.start()), m[0]) for m in find(marked))
        clean = controls == tuple(Control(m.start(), m[0]) for m in find(text))
        return Reading(text, marks, controls, clean)


def _check_roles(messages: tuple[Message, ...], place: str) -> None:
    """Raises DataError for a role that isn't one. Templates write roles as structure: Phi's makes a token of
    `<|` + role + `|>`, so a role "end" would be an end-of-turn.
    """
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{place}: there is no role {str(role)[:80]!r}; the roles are {', '.join(ROLES)}")


def _check_breakable(controls: ControlStrings, texts: Any, place: str) -> None:
    """Raises DataError for content with a control string of one character, which nothing can keep apart."""
    for text in strings(texts) if controls.unbreakable else ():
        found = sorted(controls.unbreakable.intersection(text))
        if found:
            raise DataError(f"{place}: holds {found[0]!r}, which is a control token of this tokenizer")


def _template_text(source: str) -> str:
    """Jinja text, or the content of the file it names. Raises ModelError if it is neither."""
    if "{%" in source or "{{" in source or "\n" in source:
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise ModelError(
            f"data.chat_template got {source!r}; it takes Jinja text or the path of a file that exists"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"data.chat_template: {path} is not a text file") from error
