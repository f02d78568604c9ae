"""How responses are drawn from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.recipe.coerce import build
from lora_dpo.recipe.section import Count, Positive, Section


@dataclass(frozen=True)
class Sampling(Section):
    """Several responses to each prompt, drawn at random, and what that may cost.

    responses: how many to each prompt. temperature: logits are divided by it; near 0 is nearly greedy. top_p:
    draw from the fewest most likely tokens whose probabilities add up to at least this, after temperature; 1
    draws from all. max_new_tokens: where a response that does not end is cut. seed: of the noise.
    tokens_in_cache: memory, in tokens whose keys and values are kept at a time: it decides how many prompts
    are answered together. null chooses by the device. It never changes the noise, only rounding.
    """

    section: ClassVar[str] = "sampling"
    responses: Count = 8
    temperature: Positive = 1.0
    top_p: Annotated[float, AtLeast(0, high=1, exclusive=True)] = 1.0
    max_new_tokens: Count = 256
    seed: Annotated[int, AtLeast(0, high=2**63 - 1)] = 0
    tokens_in_cache: Count | None = None


def sampling_of(words: Sequence[str]) -> Sampling:
    """From "key=value" texts; "sampling." in front may be left out. Raises RecipeError by key."""
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r} is no key: write key=value, such as responses=8")
        values[key.strip().removeprefix("sampling.")] = value
    return build(Sampling, values, "sampling")
