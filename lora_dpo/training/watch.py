"""What a person would notice in the metrics of a run that goes wrong, said in words while it goes on.

Every threshold is relative to the run's own numbers, so that it means the same for every objective; a metric
that an objective does not give is not looked at. The thresholds are meant to be far outside of an ordinary
run: a line that is said too often is not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

WINDOW = 64
"""A spike is one beside so many steps before it."""

ENOUGH = 16
"""With fewer steps than this there is no usual value yet; as many make a trend."""

BEGINNING = 8
"""The median of so many first steps is the size of the loss, or of the gradient, of this run."""

LOSS_RANGES = 3.0
"""A loss spikes where it lies so many ranges of the window above all of it: the range of 64 normal values is
about 4.7 standard deviations, so that is some 16 of them. It also exceeds the median by half of the
beginning's.
"""

NORM_TIMES = (10.0, 4.0)
"""A gradient norm spikes above so many times the window's median and so many times its largest, and above the
beginning's. Norms are about log-normal with σ of 0.2 to 0.5; even at 0.7 that is one step in 100,000.
"""

DIVERGED = 3.0
"""The loss has left the run where the median of the last steps is so many times that of the beginning. Chance
gets an untrained policy's loss, so a policy this much worse is no ordinary noise.
"""

SATURATED = 0.01
"""Nothing is left to learn where every pair is right and the loss is this share of the first ones' largest.
In DPO the gradient of a pair is β σ(−margin), and 1% of ln 2 is a margin of 5. A run is stuck where its
gradient alone is this small.
"""

STILL = 25
"""So many steps without any gradient, or with one and the same loss. More than the 20 updates
that may overflow in a row under float16's loss scaling, whose recorded norm is 0 too.
"""

SAME = 1e-5
"""Losses this close, relatively, are one: reference log-probs that were kept from another packing differ by
float32's rounding. While the learning rate still rises nothing is concluded from it.
"""

TREND = 32
"""Both log-probs fall where the medians of two such spans, one after the other, say so."""

SHIFT_NATS, SHIFT_SHARE = 10.0, 0.1
"""Chosen responses have become unlikely below both: e^-10 of their probability under the reference, and a
tenth more nats than they had there (10% more nats a token, whatever the length). DPO lowers both sides a
little in most runs.
"""

QUIET = 200
"""Steps until another spike is worth another line."""

CHANGES = ("logps/chosen_change", "logps/rejected_change")
SERIES = ("loss", "grad_norm", "rewards/accuracy", "logps/chosen", "learning_rate", *CHANGES)


class Watch:
    """Feed it every step's metrics, and say the lines that it gives. Its state is small, and plain JSON."""

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {name: [] for name in SERIES}
        self._first: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        # Cause → where it was said last: a step's number, or the value that must be exceeded to say it again.
        self._said: dict[str, float] = {}
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {
            "recent": {name: list(values) for name, values in self._recent.items()},
            "first": {name: list(values) for name, values in self._first.items()},
            "said": dict(self._said),
            "steps": self._steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch did whose `state()` this is; an empty one is a new watch's."""
        self.__init__()
        if state:
            self._recent |= {name: list(values) for name, values in state["recent"].items()}
            self._first |= {name: list(values) for name, values in state["first"].items()}
            self._said |= state["said"]
            self._steps = state["steps"]

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said after this step; mostly nothing. Values that aren't finite are not looked at."""
        self._steps += 1
        now = {name: float(metrics[name]) for name in SERIES if math.isfinite(metrics.get(name, math.nan))}
        lines = list(self._spikes(now))  # beside the steps before
        for name, value in now.items():
            self._recent[name] = [*self._recent[name], value][-WINDOW:]
            if name in self._first and len(self._first[name]) < BEGINNING:
                self._first[name].append(value)
        for check in (self._diverged, self._saturated, self._stuck, self._dead, self._falling):
            line = check()
            if line:
                lines.append(line)
        return lines

    def _spikes(self, now: Mapping[str, float]) -> Iterator[str]:
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
            window = self._recent[name]
            if name not in now or len(window) < ENOUGH:
                continue
            value, usual, begun = now[name], median(window), abs(median(self._first[name]))
            if name == "loss":
                far = max(window) + LOSS_RANGES * (max(window) - min(window))
                spiked = value > far and value - usual > 0.5 * begun
            else:
                spiked = value > max(NORM_TIMES[0] * usual, NORM_TIMES[1] * max(window), begun) > 0
            if spiked and self._steps - self._said.get(f"spike of {name}", -math.inf) > QUIET:
                self._said[f"spike of {name}"] = self._steps
                yield (
                    f"watch: {what} jumped to {value:.3g}, where {usual:.3g} was usual. One odd batch does no"
                    " harm; if it stays there or comes again: a lower training.learning_rate, a longer"
                    " training.warmup, or a smaller training.max_grad_norm"
                )

    def _diverged(self) -> str | None:
        losses = self._recent["loss"]
        begun, last = self._begun("loss"), losses[-ENOUGH:]
        if begun is None or begun <= 0 or len(losses) < BEGINNING + ENOUGH:
            return None
        now = median(last)
        if not self._new("diverged", now > DIVERGED * begun, over=now < 1.5 * begun):
            return None
        return (
            f"watch: the loss is {now:.3g}, where it began with {begun:.3g}: training has made the policy"
            " worse than it was. Try a lower training.learning_rate; earlier checkpoints may be better"
        )

    def _saturated(self) -> str | None:
        right, losses = self._recent["rewards/accuracy"][-ENOUGH:], self._recent["loss"][-ENOUGH:]
        if len(losses) < ENOUGH:
            return None
        begun, now = max(self._first["loss"]), median(losses)
        # Without pairs there is no accuracy, and the loss alone says it.
        learned = 0 <= now < SATURATED * begun and (not right or min(right) == 1.0)
        over = now > 3 * SATURATED * begun or bool(right and median(right) < 1.0)
        if not self._new("saturated", learned, over=over):
            return None
        return (
            "watch: next to nothing is left of the loss, and so of its gradient: this run has no more to"
            " learn from these rows. Fewer training.epochs, a lower training.learning_rate, or a larger"
            " loss.beta; look at the held-out loss, which may be rising"
        )

    def _stuck(self) -> str | None:
        begun, norms = self._begun("grad_norm"), self._recent["grad_norm"][-ENOUGH:]
        if begun is None or begun <= 0 or len(norms) < ENOUGH or "saturated" in self._said:
            return None
        now = median(norms)
        losses = self._recent["loss"][-ENOUGH:]
        left = bool(losses) and abs(median(losses)) > 3 * SATURATED * max(map(abs, self._first["loss"]))
        if not self._new("stuck", left and 0 < now < SATURATED * begun, over=now > 3 * SATURATED * begun):
            return None
        return (
            f"watch: the gradient's norm is {now:.2g}, under {SATURATED:.0%} of where it began, though a"
            f" loss of {losses[-1]:.3g} is left: the adapter hardly moves. Most often the learning rate was"
            " so high that it broke the model: try a lower training.learning_rate; else every pair is right"
            " by far, and fewer training.epochs do"
        )

    def _dead(self) -> str | None:
        norms, losses = self._recent["grad_norm"][-STILL:], self._recent["loss"][-STILL:]
        no_gradient = len(norms) == STILL and not any(norms)
        rates = self._recent["learning_rate"][-STILL:]
        warming = bool(rates) and rates[-1] > rates[0]
        same_loss = len(losses) == STILL and max(losses) - min(losses) <= SAME * abs(losses[-1])
        same_loss = same_loss and not warming
        if not self._new("dead", no_gradient or same_loss, over=not (no_gradient or same_loss)):
            return None
        if "saturated" in self._said:
            return None
        what = "the gradient is 0" if no_gradient else f"the loss is {losses[-1]:.6f}, always the same,"
        return (
            f"watch: {what} since {STILL} steps: the adapter does not move. Is training.learning_rate too"
            " low, is the adapter on layers that do nothing here, or do all rows have a weight of 0?"
        )

    def _falling(self) -> str | None:
        chosen, rejected = self._recent["logps/chosen_change"], self._recent["logps/rejected_change"]
        if min(len(chosen), len(rejected)) < 2 * TREND:
            return None
        (before, now), (rejected_before, rejected_now) = map(_halves, (chosen, rejected))
        policy = self._recent["logps/chosen"]
        own = abs(median(policy[-TREND:]) - now) if policy else 0.0
        limit = max(SHIFT_NATS, SHIFT_SHARE * own)
        falling = now < before - 0.05 * limit and rejected_now < rejected_before - 0.05 * limit
        if not (falling and max(now, rejected_now) < -limit) or -now < self._said.get("falling", 0.0):
            return None
        self._said["falling"] = -2 * now  # once more when it is twice as deep
        return (
            f"watch: chosen responses have become {-now:.3g} nats less likely than under the reference,"
            f" rejected ones {-rejected_now:.3g}, and both still fall: what the policy says instead is in"
            " neither. Try DPOP or RPO, which hold the chosen ones up, a larger loss.beta, a lower"
            " training.learning_rate, or pairs sampled from this policy (`lora-dpo rounds`)"
        )

    def _begun(self, name: str) -> float | None:
        """The size of the first steps' values; None before there are enough."""
        first = self._first[name]
        return abs(median(first)) if len(first) == BEGINNING else None

    def _new(self, cause: str, there: bool, *, over: bool) -> bool:
        """Whether a cause is there that wasn't; it can come again once it was over."""
        if there and cause not in self._said:
            self._said[cause] = self._steps
            return True
        if over and not there:
            self._said.pop(cause, None)
        return False


def _halves(values: list[float]) -> tuple[float, float]:
    """The medians of the last two spans, the earlier one first."""
    return median(values[-2 * TREND : -TREND]), median(values[-TREND:])
