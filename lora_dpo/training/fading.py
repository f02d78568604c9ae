"""A signal that fades, said in words: the policy has left both responses of its data behind.

As in `Watch`, thresholds are relative to the run's own numbers, and far outside of an ordinary run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_dpo.recipe import Shift

GROWN = 0.5
"""Every kind of response of the data has become less likely, beside own samples, by this share of the nats a
token that the run began with (the most of own samples, chosen and rejected).
"""

DRIFTED = 0.1
"""And the KL divergence from the reference has grown by so many of these nats a token."""


class Fading:
    """Feed it every measurement of shift, and say the lines that it gives. Its state is small, plain JSON."""

    def __init__(self, settings: Shift):
        # What was measured otherwise is nothing to compare with.
        self._of = [settings.prompts, settings.responses, settings.max_new_tokens]
        self._first: dict[str, float] = {}
        self._said = 0.0

    def state(self) -> dict[str, Any]:
        """What `restore` takes; empty before the first measurement."""
        return {"of": self._of, "first": dict(self._first), "said": self._said} if self._first else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose `state()` this is, where it measured as this one does."""
        if state and state["of"] == self._of:
            self._first, self._said = dict(state["first"]), state["said"]

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said after a measurement; mostly nothing."""
        if not all(map(math.isfinite, metrics.values())):
            return []
        if not self._first:
            self._first = dict(metrics)
            return []
        first = self._first
        sides = [name for name in metrics if name.endswith("_gap")]
        grown = min(metrics[side] - first[side] for side in sides)
        drifted = metrics["shift/kl_per_token"] - first["shift/kl_per_token"]
        begun = max(abs(first["shift/own_logps"] - gap) for gap in (0.0, *(first[side] for side in sides)))
        faded = grown > GROWN * begun and min(metrics[side] for side in sides) > 0
        if not faded or drifted < DRIFTED * begun or grown < 2 * self._said:
            return []
        self._said = grown
        return [self._line(metrics, sides)]

    def _line(self, metrics: Mapping[str, float], sides: list[str]) -> str:
        beside = " and ".join(
            f"{metrics[side]:.2g} nats a token likelier than {_name(side)} responses (at first"
            f" {self._first[side]:+.2g})"
            for side in sides
        )
        return (
            f"watch: the signal of these data fades: what the policy says by itself is {beside}, and a"
            f" response of its own lies {metrics['shift/kl']:.3g} nats from the reference. Pairs sampled"
            " from this policy teach it more: `lora-dpo rounds` samples, judges and trains again; so does"
            " rejection sampling, the best and worst of many samples by a reward model. Or hold it closer to"
            " its data: a larger loss.beta, a lower training.learning_rate, fewer training.epochs, or DPOP or"
            " RPO, which hold the chosen ones up"
        )


def _name(side: str) -> str:
    return side.removeprefix("shift/").removesuffix("_gap")
