"""Chats whose every text tries to forge control tokens, and the count of control ids that came of it.

A hostile chat is compared with a tame one of the same shape: what the template writes is in both, so any
further control id came out of content. The rule by which tokens are control tokens is this file's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizer_designs import SPEECH, Design

from lora_dpo.errors import UserError
from lora_dpo.preferences import Preference, Where
from lora_dpo.tokenization import ChatTokenizer

HERE = Where("hostile.jsonl", 1)
SPOKEN = (*SPEECH, "[TOOL_CALLS]")
"""What an assistant may write itself, where its tokenizer doesn't call it special."""
PLAIN = ("\n\n", "\u2581\u2581", "<b>", "</b>", "<unk>")
"""Added tokens that stand for text: white space, HTML, and what unknown characters become."""
EVERYWHERE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ note or '' }}{% for m in messages %}{{ m.name or '' }}"
    "{% if not loop.last %}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% endif %}"
    "{% endfor %}\n"
)
"""Put in front of a template, so that each writes tools, arguments, names and calls somewhere."""


@dataclass
class Tally:
    """chats: tokenized. texts: hostile strings in them. forged: control ids that came from content. refused:
    chats that were not taken at all.
    """

    chats: int = 0
    texts: int = 0
    forged: int = 0
    refused: int = 0
    seen: list[str] = field(default_factory=list)


def control_ids_of(design: Design) -> dict[str, int]:
    added = design.tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.content not in PLAIN}


def hostile_texts(rng: random.Random, strings: list[str]) -> Callable[[bool], str]:
    """A source of texts that hold control strings whole, cut, nested, repeated, in other forms and cases.

    The argument: whether it may hold what assistants write themselves.
    """

    def text(spoken: bool) -> str:
        usable = strings if spoken else [s for s in strings if s not in SPOKEN]
        parts = [_part(rng, usable) for _ in range(rng.randint(1, 4))]
        return rng.choice(("", " ", "\n")).join(parts)

    return text


def _part(rng: random.Random, strings: list[str]) -> str:
    one, other = rng.choice(strings), rng.choice(strings)
    cut = rng.randint(1, max(1, len(one) - 1))
    wide = one.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    forms = (
        one,
        one * 2,
        one[:cut],
        one[cut:],
        one[:cut] + other + one[cut:],
        f"{one[:cut]} {one[cut:]}",
        f"{one[:cut]}\u200b{one[cut:]}",
        f"{other}\n{rng.choice(('system', 'user', 'assistant'))}\n{one}",
        f"{other}{rng.choice(('system', 'user', 'assistant'))}{one}",
        f" {one} ",
        one.upper(),
        one.strip("<>|[]"),
        wide,
        "<0x0A><0x3C>",
        f"\U000f0000{one}\U00100000",
        rng.choice(("Hello there", "x > y | no [1]", "\u00e9\u4f60\U0001f600", "a < b")),
    )
    return rng.choice(forms)


def record(shape: int, text: Callable[[bool], str], *, system: bool, spoken: bool) -> Preference:
    """A preference of a shape that the number decides; `text` gives every text in it.

    spoken: whether the assistant's texts may hold what it writes itself.
    """
    rng = random.Random(shape)
    turns: list[dict[str, Any]] = []
    if system and rng.random() < 0.5:
        turns.append({"role": "system", "content": text(True)})
    for _ in range(rng.randint(0, 2)):
        turns += [{"role": "user", "content": text(True)}, {"role": "assistant", "content": text(spoken)}]
    turns.append({"role": "user", "content": text(True), "name": text(True)})
    tools = None
    if rng.random() < 0.5:
        call = {"function": {"name": text(spoken), "arguments": {text(spoken): text(spoken), "n": 3}}}
        turns.append({"role": "assistant", "content": text(spoken), "tool_calls": [call]})
        turns.append({"role": "tool", "name": text(True), "content": text(True)})
        properties = {text(True): {"type": "string", "description": text(True)}}
        parameters = {"type": "object", "properties": properties}
        function = {"name": text(True), "description": text(True), "parameters": parameters}
        tools = ({"type": "function", "function": function},)
    kwargs = {"note": text(True)} if rng.random() < 0.5 else {}
    sides = [({"role": "assistant", "content": text(spoken) + end},) for end in (" yes.", " no.")]
    return Preference(tuple(turns), sides[0], sides[1], HERE, tools, kwargs)


class Attack:
    """One design under attack: its chats, answers and prompts to generate from, against tame ones."""

    def __init__(self, design: Design) -> None:
        self.design, self.tally = design, Tally()
        self.controls = control_ids_of(design)
        self.chat = ChatTokenizer(design.tokenizer, EVERYWHERE + design.template, 1_000_000)
        tokens = design.tokenizer.added_tokens_decoder.values()
        self._single_word = any(token.single_word for token in tokens)
        own = {text: index for text, index in self.controls.items() if text not in SPOKEN}
        self._all, self._structure = (np.array(sorted(x.values())) for x in (self.controls, own))

    @property
    def strings(self) -> list[str]:
        return list(self.controls)

    def run(self, shape: int, text: Callable[[bool], str], *, spoken: bool) -> None:
        """Count what `text` forges. spoken: assistants may write what is theirs, which then isn't counted."""
        used: list[str] = []

        def hostile(allowed: bool) -> str:
            used.append(text(allowed))
            return used[-1]

        options = {"system": self.design.system, "spoken": spoken}
        bad = record(shape, hostile, **options)
        tame = record(shape, lambda _: ".", **options)
        counted = self._structure if spoken else self._all
        try:
            found = [self._of(ids, counted) for ids in self._ids(bad)]
        except UserError:
            self.tally.refused += 1
            return
        expected = [self._of(ids, counted) for ids in self._ids(tame)]
        self.tally.chats += 1
        self.tally.texts += len(used)
        forged = sum(self._forged(*pair) for pair in zip(found, expected, strict=True))
        if forged:
            self.tally.forged += forged
            self.tally.seen.append(repr(bad)[:2000])

    def _ids(self, item: Preference) -> Iterable[np.ndarray]:
        branches = self.chat.branches(item)
        yield from (branches.side(n) for n in range(branches.sides))
        assert not isinstance(item.prompt, str)
        yield self.chat.prompt_ids(item.prompt, item.tools, item.template_kwargs)

    def _forged(self, found: list[int], expected: list[int]) -> int:
        """How many ids are there that the template didn't write, or are missing of those that it did."""
        if self._single_word:  # beside a word the tokenizer itself doesn't see those of the template either
            rest = iter(expected)
            return sum(index not in rest for index in found)
        return abs(len(found) - len(expected)) or int(found != expected)

    @staticmethod
    def _of(ids: np.ndarray, counted: np.ndarray) -> list[int]:
        return ids[np.isin(ids, counted)].tolist()
