"""What a judge is: called with prompts and their responses, it gives every response a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import xxhash

from lora_dpo.errors import RunError
from lora_dpo.preferences import Message, Where

Item = TypeVar("Item")

AT_ONCE = 16
"""Prompts that a judge is given together, unless it says otherwise by an attribute `at_once`."""


@dataclass(frozen=True)
class Candidates:
    """A prompt and the responses to it that are judged.

    id: names the prompt. prompt: messages, or text that is already rendered. tools, template_kwargs: for the
    chat template. tokens, finished: of each response its length as sampled, and whether it ended by itself;
    empty where nobody knows.
    """

    id: str
    prompt: tuple[Message, ...] | str
    responses: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    finished: tuple[bool, ...] = ()


def where(candidates: Candidates) -> Where:
    """A prompt's place, for errors."""
    return Where(f"prompt {candidates.id}", 1)


class JudgeProtocol(Protocol):
    """A judge. name: short, such as "implicit". fingerprint: 16 hexadecimal digits of what decides a reward;
    another one is another judge.

    It may also have `at_once`, how many prompts it is best given together; `whole_groups`, true where a
    reward depends by rounding on those that it is given with, as a model's does; and `notes()`, lines to
    print about what it has met so far.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """A reward for every response of every prompt, higher is better. `progress` is told how many prompts
        more are done."""
        ...


def tag(judge: JudgeProtocol) -> str:
    """How files name a judge."""
    return f"{judge.name}:{judge.fingerprint}"


def at_once(judge: JudgeProtocol) -> int:
    return int(getattr(judge, "at_once", AT_ONCE))


def notes_of(judge: JudgeProtocol) -> list[str]:
    notes: Callable[[], list[str]] | None = getattr(judge, "notes", None)
    return notes() if notes is not None else []


def fingerprint(*facts: object) -> str:
    """16 hexadecimal digits of a hash of these, by their repr."""
    return xxhash.xxh3_64_hexdigest(repr(facts).encode("utf-8", "surrogatepass"))


def distinct(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """Each different one once, and for every item where among those it stands: equal texts are judged once,
    and so alike."""
    place = {item: n for n, item in enumerate(dict.fromkeys(items))}
    return list(place), [place[item] for item in items]


def check_rewards(
    judge: JudgeProtocol, group: Sequence[Candidates], rewards: Sequence[Sequence[float]]
) -> None:
    """Raise RunError where a judge did not give every response one finite number."""
    if len(rewards) != len(group):
        raise RunError(
            f"the judge {judge.name} gave {len(rewards)} lists of rewards for {len(group)} prompts"
        )
    for candidates, row in zip(group, rewards, strict=True):
        if len(row) != len(candidates.responses):
            raise RunError(
                f"the judge {judge.name} gave {len(row)} rewards for the {len(candidates.responses)}"
                f" responses of prompt {candidates.id}"
            )
        if not all(math.isfinite(reward) for reward in row):
            raise RunError(f"the judge {judge.name} gave prompt {candidates.id} a reward that is not finite")
