"""What has to go when a record is too long: the oldest of the prompt first, the ends of the responses last.

The prompt is what stands before the first scored token. It may have `max_prompt_tokens`, and where prompt
and longest response together pass `max_tokens` it gives way to the response, down to a quarter of
`max_tokens`. Whole messages go while that is enough: the rest still begins with a user's message, and the
system's is kept if it fits. Otherwise the tokens on the left go, except a BOS. Both sides keep the same
prompt. What still passes `max_tokens` then is cut from the responses' ends, and such a response rightly has
no end-of-turn.

Legend: `T` tokens of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_dpo.preferences import Message, Where
from lora_dpo.tokenization.branches import Ids, Mask

IDENTICAL = "responses are identical after truncation"
IDENTICAL_UNCUT = "responses are identical once tokenized"
NOTHING_SCORED = "nothing left to score"
MISMATCHED = "the chat template can't put another row's response under this prompt"


class Dropped(Exception):
    """A record that truncation (or the template) left useless. reason: one of this module's constants."""

    def __init__(self, reason: str, where: Where) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.where = where


@dataclass(frozen=True, eq=False)
class Side:
    """ids: int32 [T]. scored: bool [T]. lead: how many tokens in front are BOS or the like."""

    ids: Ids
    scored: Mask
    lead: int

    @property
    def prompt(self) -> int:
        """Tokens before the first scored one, T if there is none."""
        return int(self.scored.argmax()) if self.scored.any() else len(self.ids)


@dataclass(frozen=True)
class Limits:
    """tokens: longest side. prompt: longest prompt, None for no limit of its own."""

    tokens: int
    prompt: int | None = None

    def prompt_room(self, sides: Sequence[Side]) -> int:
        """How many tokens the prompt of these sides may keep."""
        prompt = max(side.prompt for side in sides)
        room = prompt if self.prompt is None else min(prompt, self.prompt)
        response = max(len(side.ids) - side.prompt for side in sides)
        if room + response > self.tokens:
            room = min(room, max(self.tokens - response, self.tokens // 4))
        return max(room, 1)


def longest_prompt(sides: Sequence[Side]) -> int:
    return max(side.prompt for side in sides)


def shorter_prompts(prompt: tuple[Message, ...]) -> list[list[tuple[Message, ...]]]:
    """Prompts without their oldest messages, longest first: a list with the system's message, one without.

    Each begins with a user's message after that; the last one is the shortest there is.
    """
    system = prompt[:1] if prompt and prompt[0]["role"] in ("system", "developer") else ()
    starts = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    with_system = [system + prompt[start:] for start in starts if system and start > 1]
    return [with_system, [prompt[start:] for start in starts if start > 0]]


def cut_left(side: Side, room: int, longest: int) -> Side:
    """Cut `longest - room` tokens from the left of the prompt, but neither the lead nor all of it."""
    count = min(longest - room, side.prompt - max(side.lead, 1))
    if count <= 0:
        return side
    keep = np.r_[0 : side.lead, side.lead + count : len(side.ids)]
    return Side(side.ids[keep], side.scored[keep], side.lead)


def cut_right(side: Side, tokens: int) -> Side:
    return Side(side.ids[:tokens], side.scored[:tokens], side.lead)


def check(sides: Sequence[Side], where: Where, cut: bool, alike: bool = False) -> None:
    """Raises Dropped if a side has nothing scored, or (unless they may be `alike`) two are the same up to
    their last scored token.
    """
    if not all(side.scored[1:].any() for side in sides):
        raise Dropped(NOTHING_SCORED, where)
    if alike:
        return
    ends = [int(np.flatnonzero(side.scored)[-1]) + 1 for side in sides]
    seen = {
        (side.ids[:end].tobytes(), side.scored[:end].tobytes()) for side, end in zip(sides, ends, strict=True)
    }
    if len(seen) < len(sides):
        raise Dropped(IDENTICAL if cut else IDENTICAL_UNCUT, where)
