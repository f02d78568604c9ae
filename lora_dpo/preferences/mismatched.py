"""For every rating the response of another one: the sample that KTO's estimate of the KL divergence takes.

KTO (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1) estimates KL(policy || reference) from responses
under prompts that they don't answer. These should be spread as the rated responses are, so each record takes
that of the next one: not in the file's order, where neighbours are alike (both sides of a pair, a topic, all
thumbs up), but in a shuffled one. It is the same shuffle for every seed: the seed of a run isn't to change
what is tokenized, and kept of the reference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lora_dpo.preferences.mixture import digest, prompt_key
from lora_dpo.preferences.records import Rating

LOOK_AHEAD = 100
"""So many records are looked through for one with another prompt and another response."""


def with_mismatched(records: Sequence[Rating]) -> list[Rating]:
    """The records, each with the response of another one: of the next whose prompt and response both differ.

    Where there is none near, only the response differs; where all responses are equal, it is the next one's.
    Raises ValueError for a single record, which has no other.
    """
    if len(records) == 1:
        raise ValueError("a single rating has no other one to take a response from")
    prompts = [prompt_key(record) for record in records]
    responses = [digest(record.response) for record in records]
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    # Of these two responses at least one differs from any given one, unless all are equal.
    others = [*order[:1], *(n for n in order if responses[n] != responses[order[0]])][:2]

    def partner(place: int) -> int:
        own, answers_own = order[place], None
        for step in range(1, min(len(order), LOOK_AHEAD + 1)):
            other = order[(place + step) % len(order)]
            if responses[other] == responses[own]:
                continue
            if prompts[other] != prompts[own]:
                return other
            answers_own = other if answers_own is None else answers_own
        if answers_own is not None:
            return answers_own
        following = order[(place + 1) % len(order)]
        return next((other for other in others if responses[other] != responses[own]), following)

    partners = {own: partner(place) for place, own in enumerate(order)}
    return [replace(r, mismatched=records[partners[n]].response) for n, r in enumerate(records)]
