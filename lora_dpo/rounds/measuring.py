"""What a policy's responses to held-out prompts show: reward, KL, and whether the judge is being fooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lora_dpo.evaluation import Interval, bootstrap
from lora_dpo.judging import Candidates, ImplicitJudge, read_samples
from lora_dpo.judging.guard import report
from lora_dpo.model import Model
from lora_dpo.rounds.directory import RoundDirectory
from lora_dpo.rounds.policies import Loop


def measure(loop: Loop, policy: Model, here: RoundDirectory) -> dict[str, Any]:
    """Means over prompts with 95% intervals, and the guard's figures.

    kl: KL(policy ‖ base) in nats a response, by its samples: the mean of log π − log base (Schulman's k1), of
    the responses as training sees them, tokenized again.
    """
    judged = read_samples(here.held_out.judged)
    groups, rewards = [row.candidates for row in judged], [row.scores for row in judged]
    second = None
    if here.second_opinion.exists():
        second = [row.scores for row in read_samples(here.second_opinion)]
    found: dict[str, Any] = {"reward": _interval(rewards)}
    if second is not None:
        found["held_out_reward"] = _interval(second)
    found["kl"] = _interval(_log_ratios(loop, policy, groups))
    return found | {"guard": report(groups, rewards, second)}


def _interval(values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Over prompts, each with the mean of its responses."""
    means = torch.tensor([sum(own) / len(own) for own in values], dtype=torch.float64)
    interval: Interval = bootstrap(means)
    return dataclasses.asdict(interval)


def _log_ratios(loop: Loop, policy: Model, groups: Sequence[Candidates]) -> list[list[float]]:
    """log π − log base of every response; 0 where the policy is the base."""
    if not policy.adapter_layers:
        return [[0.0] * len(group.responses) for group in groups]
    budget = loop.recipe.training.tokens_per_microbatch
    say = loop.display.say
    ratios = ImplicitJudge(policy, loop.chat, beta=1.0, tokens_per_microbatch=budget, say=say)
    with loop.display.counting("measuring KL", len(groups)) as advance:
        return ratios(groups, advance)
