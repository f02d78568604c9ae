"""Objectives that look at tokens one by one, and those that change what another objective sees of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.errors import RecipeError
from lora_dpo.losses.margin import DPO
from lora_dpo.losses.objective import (
    LogProbs,
    Loss,
    Needs,
    NotNegative,
    Objective,
    Positive,
    Records,
    Share,
    preference_metrics,
)


@dataclass(frozen=True)
class Wrapper(Objective):
    """What objectives around another one share; alone it is none."""

    of: Objective = field(default_factory=DPO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of.records != "pairs":
            raise RecipeError(
                f"loss.of got {type(self.of).__name__}, which is for {self.of.records}, not pairs"
            )
        if self.of.needs.rewards:
            raise RecipeError(
                f"loss.of got {type(self.of).__name__}, which looks at rewards: they have no tokens to change"
            )

    @property
    def sides(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.sides

    @property
    def records(self) -> Records:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.records

    @property
    def needs(self) -> Needs:
        return self.of.needs | Needs(reference=False, tokens=True)


@dataclass(frozen=True)
class LDDPO(Wrapper):
    """Length-desensitized DPO (Liu et al. 2024, arXiv:2409.06411, eq. 9), around any objective of pairs: what
    a response says beyond the length of the other one counts alpha times, for policy and reference.

    of: the objective. alpha: 1 is the objective itself, 0 leaves the longer end out.
    """

    alpha: Share = 0.5

    def __call__(self, logprobs: LogProbs) -> Loss:
        tokens, shared = logprobs.by_token, logprobs.lengths.amin(dim=1, keepdim=True)
        public = tokens.place < shared.expand_as(logprobs.lengths).reshape(-1)[tokens.sequences]
        weight = torch.where(public, 1.0, self.alpha)
        reference = tokens.reference
        seen = replace(
            logprobs,
            policy=logprobs.per_sequence(weight * tokens.policy),
            reference=None if reference is None else logprobs.per_sequence(weight * reference),
        )
        return self.of(seen)


@dataclass(frozen=True)
class WPO(Wrapper):
    """Weighted preference optimization (Zhou et al. 2024, arXiv:2406.11827, eq. 2 with the alignment of
    section 3.2), around any objective of pairs: a pair counts by how likely the policy itself would say it,
    w = Π_sides exp(mean over tokens of (log π(token) − log Σ_v π(v)²)), without gradient.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of.needs.ranks:
            name = type(self.of).__name__
            raise RecipeError(f"loss.of got {name}, which compares ranks: WPO weighs pairs; take another")

    @property
    def needs(self) -> Needs:
        return self.of.needs | Needs(reference=False, tokens=True, square_sum=True)

    def __call__(self, logprobs: LogProbs) -> Loss:
        loss, tokens = self.of(logprobs), logprobs.by_token
        assert tokens.square_sum is not None
        aligned = logprobs.per_sequence(tokens.policy.detach() - tokens.square_sum)
        weight = (aligned / logprobs.lengths.clamp(min=1)).sum(dim=1).exp()
        metrics = {**loss.metrics, "weights/policy": weight}
        return replace(loss, per_example=weight * loss.per_example, metrics=metrics)


@dataclass(frozen=True)
class TDPO(Objective):
    """Token-level DPO (Zeng et al. 2024, arXiv:2404.11999, eqs. 15 to 17): −log σ(u − α δ), with u DPO's
    margin and δ = β D(rejected) − β sg(D(chosen)), D = Σ_t KL(ref ‖ π) over a response's positions.

    It holds the policy near the reference at every token, more so on rejected responses. alpha: how much.
    stop_gradient: sg, none flows through D(chosen) (TDPO₂); without it, and with alpha 1, it is TDPO₁.
    """

    beta: Positive = 0.1
    alpha: NotNegative = 0.5
    stop_gradient: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(tokens=True, divergence=True)

    def __call__(self, logprobs: LogProbs) -> Loss:
        divergence = logprobs.by_token.divergence
        assert divergence is not None
        apart: Tensor = self.beta * logprobs.per_sequence(divergence)
        chosen = apart[:, 0].detach() if self.stop_gradient else apart[:, 0]
        rewards = self.beta * logprobs.log_ratio
        margin = rewards[:, 0] - rewards[:, 1]
        metrics = preference_metrics(rewards, logprobs)
        metrics |= {f"kl/{side}": apart[:, n].detach() / self.beta for n, side in enumerate(self.sides)}
        return Loss(-logsigmoid(margin - self.alpha * (apart[:, 1] - chosen)), metrics)
