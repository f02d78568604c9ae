"""Objectives whose loss of an example depends on the step's others, or on what earlier steps saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.losses.objective import (
    LogProbs,
    Loss,
    Needs,
    NotNegative,
    Objective,
    Positive,
    Share,
    Smoothing,
    preference_metrics,
)


@dataclass(frozen=True)
class AOT(Objective):
    """Alignment via optimal transport (Melnyk et al. 2024, arXiv:2406.05882, algorithm 1): DPO's loss between
    the sorted values of two distributions, −log σ(β(u_(i) − v_(i))), so that one dominates the other.

    paired: u are log π(chosen) − log π(rejected), v the reference's; else u are the chosen responses'
    log-ratios and v the rejected ones'. Sorted over the whole step, where TRL sorts what one forward call
    holds; where values tie, their order does not matter. label_smoothing: as in DPO. The loss belongs to
    ranks, not to pairs, so a row can't have a weight.
    """

    beta: Positive = 0.1
    paired: bool = True
    label_smoothing: Smoothing = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(whole_step=True, ranks=True)

    def __call__(self, logprobs: LogProbs) -> Loss:
        if "weight" in logprobs.values and bool((logprobs.values["weight"] != 1).any()):
            raise RecipeError(
                "loss AOT compares sorted values, not pairs: a row's weight means nothing to it"
            )
        ratio, reference = logprobs.log_ratio, logprobs.reference
        assert reference is not None
        if self.paired:
            higher, lower = (x[:, 0] - x[:, 1] for x in (logprobs.policy, reference))
        else:
            higher, lower = ratio.unbind(1)
        margin = self.beta * (higher.sort().values - lower.sort().values)
        loss = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        return Loss(loss, preference_metrics(self.beta * ratio, logprobs))


@dataclass(frozen=True)
class BCO(Objective):
    """Binary classifier optimization for pairs (Jung et al. 2024, arXiv:2404.04656, eqs. 10 and 13):
    −log σ(r_c − δ) − log σ(−(r_r − δ)), r rewards, δ the mean reward: a moving one over steps.

    momentum: how much of δ is kept from step to step; None is δ = 0 (TRL's bco_pair), and no step depends on
    another. In
    evaluation δ is the mean of what is evaluated.
    """

    beta: Positive = 0.1
    momentum: Share | None = 0.9

    @property
    def needs(self) -> Needs:
        return Needs(whole_step=self.momentum is not None)

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        metrics = preference_metrics(rewards, logprobs)
        if self.momentum is None:
            return Loss(-logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1]), metrics)
        shift = moving(logprobs.state, "shift", rewards.detach().mean(), self.momentum)
        loss = -logsigmoid(rewards[:, 0] - shift) - logsigmoid(shift - rewards[:, 1])
        metrics["rewards/shift"] = shift.expand(len(rewards))
        return Loss(loss, metrics, {"shift": shift})


@dataclass(frozen=True)
class BetaDPO(Objective):
    """β-DPO (Wu et al. 2024, arXiv:2407.08639, eqs. 6 to 9): DPO whose β follows how far apart the step's
    pairs are, β = β₀ (1 + α (mean M − M₀)), M a pair's margin β₀ (ρ_c − ρ_r), M₀ its moving mean.

    keep: the share of a step's pairs that count, drawn without replacement by the density of a normal
    distribution with M's moving mean and standard deviation (β-guided filtering): odd ones seldom do.
    momentum: of both. β stays at least β₀ / 1000. Without state, as in evaluation, it is DPO at β₀.
    """

    beta: Positive = 0.1
    alpha: NotNegative = 0.6
    keep: Annotated[float, AtLeast(0, high=1, exclusive=True)] = 0.8
    momentum: Share = 0.9

    @property
    def needs(self) -> Needs:
        return Needs(whole_step=True)

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        gap = rewards[:, 0] - rewards[:, 1]
        metrics = preference_metrics(rewards, logprobs)
        apart = gap.detach()
        # A fresh policy's pairs are all 0 apart: no spread to measure others by yet.
        state = logprobs.state if logprobs.state.get("spread") else {}
        mean, spread = apart.mean(), apart.std(correction=0)
        after = {
            "mean": moving(state, "mean", mean, self.momentum),
            "spread": moving(state, "spread", spread, self.momentum),
            "steps": logprobs.state.get("steps", 0.0) + 1,
        }
        if not state:
            return Loss(-logsigmoid(gap), metrics, after)
        usual = state["mean"]
        scale = (1 + self.alpha * (mean - usual)).clamp(min=1e-3)
        loss = -logsigmoid(scale * gap) * self._kept(apart, usual, state["spread"], int(state["steps"]))
        metrics["beta"] = (self.beta * scale).expand(len(gap))
        return Loss(loss, metrics, after)

    def _kept(self, apart: Tensor, mean: float, spread: float, step: int) -> Tensor:
        """What each pair counts [B]: B / kept ones for those drawn, else 0. A function of the step."""
        count = max(1, round(self.keep * len(apart)))
        if count == len(apart):
            return torch.ones_like(apart)
        away = (apart.cpu() - mean) / max(spread, 1e-6)
        # Efraimidis & Spirakis: the largest log u / w are a draw without replacement by weights w.
        uniform = torch.rand(len(apart), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        keys = uniform.log().neg().log() + 0.5 * away**2  # log(−log u / w), w = exp(−away² / 2)
        kept = torch.zeros(len(apart), dtype=apart.dtype)
        kept[keys.topk(count, largest=False).indices] = len(apart) / count
        return kept.to(apart.device)


@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimization of rated responses (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8):
    λ_D (1 − σ(β(ρ − z))) for desirable ones, λ_U (1 − σ(β(z − ρ))) for others, ρ the log-ratio.

    z is the step's estimate of KL(π ‖ ref): the mean log-ratio of responses under prompts that they don't
    belong to, at least 0, without gradient. desirable, undesirable: λ; set them so that λ_D n_D / (λ_U n_U)
    is between 1 and 4/3 (section 4.2).
    """

    beta: Positive = 0.1
    desirable: Positive = 1.0
    undesirable: Positive = 1.0

    sides = ("completion", "mismatched")
    records = "ratings"

    @property
    def needs(self) -> Needs:
        return Needs(whole_step=True, trained_sides=(0,))

    def __call__(self, logprobs: LogProbs) -> Loss:
        ratio, wanted = logprobs.log_ratio, logprobs.values["desirable"] > 0.5
        anchor = ratio[:, 1].detach().mean().clamp(min=0)
        reward = self.beta * (ratio[:, 0] - anchor)
        weight = torch.where(wanted, self.desirable, self.undesirable).to(reward.dtype)
        loss = weight * torch.sigmoid(torch.where(wanted, -reward, reward))
        rewards = self.beta * ratio[:, 0].detach()
        metrics = {"kl": anchor.expand(len(ratio)), "logps/completion": logprobs.policy[:, 0].detach()}
        for name, these in (("desirable", wanted), ("undesirable", ~wanted)):
            # So that the mean over all of the step's examples is the mean over these.
            share = these.double().mean()
            metrics[f"rewards/{name}"] = torch.where(these, rewards, 0.0) / share.clamp(min=1e-12)
        return Loss(loss, metrics)


def moving(state: Mapping[str, float], name: str, now: Tensor, momentum: float) -> Tensor:
    """momentum · before + (1 − momentum) · now; now, where there is no before."""
    before = state.get(name)
    return now if before is None else momentum * before + (1 - momentum) * now
