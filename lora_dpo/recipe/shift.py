"""What is looked at, while a run goes on, of how far the policy has moved from its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_dpo.recipe.section import Count, CountOrZero, Section


@dataclass(frozen=True)
class Shift(Section):
    """How far the policy has moved from its data: `shift/…` in the metrics, measured on its own samples
    before the first step, with every evaluation, and at the end.

    prompts: how many held-out prompts (training prompts, where nothing is held out) are answered; 0 switches
    it off. responses: samples of each. max_new_tokens: where samples end at the latest, and how much of the
    data's own responses they are compared with. every: steps between measurements, instead of one with every
    evaluation.
    """

    section: ClassVar[str] = "shift"
    prompts: CountOrZero = 16
    responses: Count = 2
    max_new_tokens: Count = 64
    every: CountOrZero = 0
