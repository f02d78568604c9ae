"""What a chat template writes around the contents of a conversation, found by rendering a few.

A Jinja template can do anything; most write a fixed text before and after each turn. Where that is so, as
rendering shows, the texts are all that another template language needs. Where it isn't, that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Message = Mapping[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, with the generation prompt) → text."""

_SYSTEM, _USERS, _ASSISTANTS = (
    "qzSystemqz",
    ("qzUserAqz", "qzUserBqz", "qzUserCqz"),
    ("qzSaidAqz", "qzSaidBqz"),
)
_CONTENTS = (
    "Hello.",
    "Two\nlines,\n\na gap.",
    'A "quoted" word, """three""" and \'single\' ones.',
    "{{ .Content }} {% if x %} $i \\n",
    "Zażółć 你好 😀",
    "1 < 2 & 3 > 2",
)


_BEGINNINGS, _ENDINGS = "<[\n", ">]\n "
"""Characters with which names of control tokens begin and end, and lines."""


class NotExpressible(Exception):
    """A template whose turns are no fixed texts around contents; the message says what differs."""


@dataclass(frozen=True)
class Turn:
    """What is written before and after a content."""

    before: str
    after: str


@dataclass(frozen=True)
class Turns:
    """A chat template as fixed texts.

    begin: before everything. default: after it, where no system message is given. system: None where the
    template takes no such message. inside: a system message is a turn of its own, or stands inside the first
    or the last user's. generation: what asks for an assistant's turn. bos: what the runtime puts in front of
    every prompt itself, so that the first text goes without; empty where it adds nothing. trims: whether the
    template strips white space around contents.
    """

    begin: str
    default: str
    system: Turn | None
    inside: Literal["no", "first", "last"]
    user: Turn
    assistant: Turn
    generation: str
    bos: str = ""
    trims: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a user's turn, and the generation prompt."""
        given = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        text = self.begin
        if not given:
            text += self.default
        elif self.system is not None and self.inside == "no":
            text += self.system.before + given[0] + self.system.after
        for n, message in enumerate(turns):
            turn = self.user if message["role"] == "user" else self.assistant
            held = (self.inside == "first" and n == 0) or (self.inside == "last" and n == len(turns) - 1)
            text += turn.before
            if held and given and self.system is not None:
                text += self.system.before + given[0] + self.system.after
            text += message["content"] + turn.after
        return (text + self.generation).removeprefix(self.bos)


def find_turns(render: Render, bos: str, adds_bos: bool) -> Turns:
    """The turns of a template, checked on conversations of one to five, with a system message and without.

    bos: the tokenizer's, empty where it has none. adds_bos: whether the tokenizer, and with it the runtime,
    puts it in front by itself. Raises NotExpressible.
    """
    turns = _with_system(_without_system(render), render, bos)
    if adds_bos:
        turns = replace(turns, begin=turns.begin.removeprefix(bos), bos=bos)
    turns = replace(turns, trims=_trims(render))
    _verify(turns, render)
    return turns


def _chat(*contents: str) -> list[dict[str, str]]:
    """Messages with these contents: users and assistants in turn, after the system's where it is given."""
    system = [{"role": "system", "content": _SYSTEM}] if _SYSTEM in contents else []
    rest = [content for content in contents if content != _SYSTEM]
    roles = ("user", "assistant")
    return system + [{"role": roles[n % 2], "content": content} for n, content in enumerate(rest)]


def _around(render: Render, generation: bool, *contents: str) -> list[str] | None:
    """The texts before, between and after the contents, in the order given; None where they aren't so."""
    try:
        text = render(_chat(*contents), generation)
    except Exception:  # a template raises whatever it likes
        return None
    found: list[str] = []
    for content in contents:
        before, there, text = text.partition(content)
        if not there:
            return None
        found.append(before)
    return [*found, text]


def _without_system(render: Render) -> Turns:
    (first, second, third), (one, two) = _USERS, _ASSISTANTS
    texts = _around(render, True, first, one, second, two, third)
    if texts is None:
        raise NotExpressible("it doesn't write users' and assistants' turns in order")
    if texts[1] != texts[3] or texts[2] != texts[4]:
        raise NotExpressible("later turns are written otherwise than earlier ones")
    start, asked, said, closing = texts[0], texts[1], texts[2], texts[5]
    alone = _around(render, False, first)
    after_user = alone[1] if alone is not None and alone[0] == start else ""
    if not (asked.startswith(after_user) and closing.startswith(after_user)):
        after_user = ""
    before_user = _before_user(start, said, _around(render, False, first, one))
    return Turns(
        begin=start.removesuffix(before_user),
        default="",
        system=None,
        inside="no",
        user=Turn(before_user, after_user),
        assistant=Turn(asked.removeprefix(after_user), said.removesuffix(before_user)),
        generation=closing.removeprefix(after_user),
    )


def _before_user(start: str, said: str, ended: list[str] | None) -> str:
    """How a user's turn begins. start: what stands before the first, said: between an assistant's content and
    the next user's. ended: the texts of a conversation that ends with the assistant.
    """
    tail = ended[2] if ended is not None else ""
    if tail and said.startswith(tail) and start.endswith(said.removeprefix(tail)):
        return said.removeprefix(tail)
    length = 0
    while length < min(len(start), len(said)) and start[-1 - length] == said[-1 - length]:
        length += 1
    shared, left = said[len(said) - length :], said[: len(said) - length]
    if left and left[-1] not in _ENDINGS:
        # Not from the middle of a token's name on.
        places = [place for place in map(shared.find, _BEGINNINGS) if place >= 0]
        shared = shared[min(places) :] if places else shared
    return shared


def _with_system(turns: Turns, render: Render, bos: str) -> Turns:
    first, second, one = _USERS[0], _USERS[1], _ASSISTANTS[0]
    start, asked = turns.begin + turns.user.before, turns.user.after + turns.assistant.before
    said = turns.assistant.after + turns.user.before
    closing = turns.user.after + turns.generation
    texts = _around(render, True, _SYSTEM, first, one, second)
    if texts is not None:
        before, after = texts[0], texts[1]
        if texts[2:] != [asked, said, closing]:
            raise NotExpressible("turns are written otherwise after a system message")
        if after.endswith(turns.user.before):
            shared = _shared(before, turns.begin, bos)
            system = Turn(before.removeprefix(shared), after.removesuffix(turns.user.before))
            return replace(turns, begin=shared, default=turns.begin.removeprefix(shared), system=system)
        if before.startswith(start):
            return replace(turns, system=Turn(before.removeprefix(start), after), inside="first")
        raise NotExpressible("the first user's turn is written otherwise after a system message")
    texts = _around(render, True, first, one, _SYSTEM, second)
    if texts is not None and texts[2].startswith(said):
        return replace(turns, system=Turn(texts[2].removeprefix(said), texts[3]), inside="last")
    if _takes_system(render):
        raise NotExpressible("it writes a system message where its place isn't fixed")
    return turns


def _shared(given: str, without: str, bos: str) -> str:
    """What stands before everything: the text without a system message, where that is all, else a BOS."""
    if given.startswith(without):
        return without
    return bos if given.startswith(bos) and without.startswith(bos) else ""


def _takes_system(render: Render) -> bool:
    try:
        return _SYSTEM in render(_chat(_SYSTEM, _USERS[0]), True)
    except Exception:  # a template raises whatever it likes
        return False


def _trims(render: Render) -> bool:
    texts = _around(render, True, f"  {_USERS[0]}\n ")
    return texts is None


def _verify(turns: Turns, render: Render) -> None:
    """Raise NotExpressible unless the texts give what the template gives."""
    for messages in _conversations(turns.system is not None):
        try:
            wanted = render(messages, True)
        except Exception as error:  # a template raises whatever it likes
            raise NotExpressible(f"it refuses a conversation of {len(messages)} turns: {error}") from error
        if turns.render(messages) != wanted.removeprefix(turns.bos):
            raise NotExpressible(f"a conversation of {len(messages)} turns is written otherwise")


def _conversations(with_system: bool) -> Iterator[list[dict[str, str]]]:
    """One to five turns, without a system message and with one, of contents that mean something elsewhere."""
    for count in (1, 3, 5):
        for shift in range(len(_CONTENTS)):
            contents = [_CONTENTS[(n + shift) % len(_CONTENTS)] for n in range(count + 1)]
            messages = _chat(*contents[1:])
            yield messages
            if with_system:
                yield [{"role": "system", "content": contents[0]}, *messages]
