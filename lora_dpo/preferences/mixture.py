"""Weights, caps and the split into training and evaluation: pure functions of the records and a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from lora_dpo.preferences.records import AnyRecord, Demonstration, Preference, Prompt, Rating

Record = TypeVar("Record", Preference, Demonstration, Rating, Prompt)


def prompt_key(record: AnyRecord | Prompt) -> bytes:
    """A digest that two records share when their prompts are equal.

    Records without a prompt (whole texts) share it when they are equal as a whole.
    """
    content: object = record.prompt
    if not content and isinstance(record, Preference):
        content = [record.chosen, record.rejected]
    elif not content and not isinstance(record, (Preference, Prompt)):
        content = [record.response]
    return digest(content)


def digest(content: object) -> bytes:
    """The same for messages or texts that are equal."""
    return hashlib.sha256(repr(_canonical(content)).encode()).digest()


def _canonical(value: object) -> object:
    """The value with the keys of its dicts in a fixed order."""
    if isinstance(value, dict):
        return sorted((repr(key), _canonical(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return value


def repeat(records: Sequence[Record], weight: float, seed: str) -> list[Record]:
    """Each record `weight` times: whole passes, then a random share of the records for the fraction."""
    passes = int(weight)
    share = round((weight - passes) * len(records))
    return [*records] * passes + sample(records, share, seed)


def sample(records: Sequence[Record], size: int | None, seed: str) -> list[Record]:
    """A random subset of this size, in the order of the records; all of them where they are fewer."""
    if size is None or size >= len(records):
        return list(records)
    indices = sorted(random.Random(seed).sample(range(len(records)), size))
    return [records[index] for index in indices]


def held_out_prompts(records: Sequence[Record], fraction: float, seed: int) -> set[bytes]:
    """The keys of `fraction` of the distinct prompts, at least one; independent of the records' order."""
    keys = {prompt_key(record) for record in records}
    ranked = sorted(keys, key=lambda key: hashlib.sha256(b"%d:" % seed + key).digest())
    return set(ranked[: max(1, round(fraction * len(ranked)))])


def without_prompts(records: Sequence[Record], held_out: set[bytes]) -> list[Record]:
    """The records whose prompt is not held out."""
    return [record for record in records if prompt_key(record) not in held_out]
