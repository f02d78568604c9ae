"""What a policy's responses to held-out prompts show: reward, KL, and whether the judge is being fooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_dpo.evaluation import Interval, bootstrap
from lora_dpo.judging import read_samples
from lora_dpo.judging.guard import report
from lora_dpo.model import Model
from lora_dpo.rounds.directory import RoundDirectory
from lora_dpo.rounds.policies import Loop
from lora_dpo.sampling import prompt_key, read_drawn
from lora_dpo.shift import sampled_log_ratios


def measure(loop: Loop, policy: Model, here: RoundDirectory) -> dict[str, Any]:
    """Means over prompts with 95% intervals, and the guard's figures.

    kl: KL(policy ‖ base) in nats a response, by its own samples at temperature 1: the mean of
    log π − log base of the tokens that were drawn (Schulman's k1).
    """
    judged = read_samples(here.held_out.judged)
    groups, rewards = [row.candidates for row in judged], [row.scores for row in judged]
    second = None
    if here.second_opinion.exists():
        second = [row.scores for row in read_samples(here.second_opinion)]
    found: dict[str, Any] = {"reward": _interval(rewards)}
    if second is not None:
        found["held_out_judge"] = _interval(second)
    found["kl"] = _interval(_log_ratios(loop, policy, here.held_out.samples))
    return found | {"guard": report(groups, rewards, second)}


def _interval(values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Over prompts, each with the mean of its responses."""
    means = torch.tensor([sum(own) / len(own) for own in values], dtype=torch.float64)
    interval: Interval = bootstrap(means)
    return dataclasses.asdict(interval)


def _log_ratios(loop: Loop, policy: Model, samples: Path) -> list[list[float]]:
    """log π − log base of every response; 0 where the policy is the base."""
    there = read_drawn(samples)
    if not policy.policy_adapters:
        return [[0.0] * len(own) for own in there.values()]
    asked = [loop.chat.prompt_ids(p.prompt, p.tools, p.template_kwargs) for p in loop.held_out]
    prompts = {key: ids for ids in asked if (key := prompt_key(ids.tolist())) in there}
    ratios = sampled_log_ratios(
        policy,
        list(prompts.values()),
        [there[key] for key in prompts],
        tokens_per_microbatch=loop.recipe.training.tokens_per_microbatch,
        say=loop.display.say,
    )
    return ratios.tolist()
