"""Objectives of a pair that look at its sides one by one: rewards r = β · log-ratio of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.losses.objective import (
    LogProbs,
    Loss,
    Needs,
    NotNegative,
    Objective,
    Positive,
    preference_metrics,
)


@dataclass(frozen=True)
class Rewards(Objective):
    """What objectives of the two rewards share; alone it is none."""

    beta: Positive = 0.1

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        return Loss(self.of_rewards(*rewards.unbind(1)), preference_metrics(rewards, logprobs))

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair [B] from its rewards [B] each."""
        raise NotImplementedError


@dataclass(frozen=True)
class NCA(Rewards):
    """Noise contrastive alignment for pairs (Chen et al. 2024, arXiv:2402.05369, eq. 12): −log σ(r_c) −
    ½ log σ(−r_c) − ½ log σ(−r_r). It keeps the chosen response's likelihood from falling.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@dataclass(frozen=True)
class SPPO(Rewards):
    """Self-play preference optimization with sure labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7, P = 1
    for the chosen response and 0 for the rejected one): (ρ_c − 1/(2β))² + (ρ_r + 1/(2β))², ρ log-ratios.

    beta is 1/η of the paper.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ((chosen - 0.5) ** 2 + (rejected + 0.5) ** 2) / self.beta**2


@dataclass(frozen=True)
class APOZero(Rewards):
    """Anchored preference optimization, zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): 1 − σ(r_c)
    + σ(r_r). For chosen responses better than what the model says by itself.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(Rewards):
    """Anchored preference optimization, down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8): σ(r_c) + 1
    − σ(r_c − r_r). For chosen responses that are worse than what the model says by itself.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class DPOP(Rewards):
    """DPO-Positive (Pal et al. 2024, arXiv:2402.13228, eq. 3): −log σ(r_c − r_r − λ max(0, −r_c)).

    penalty λ: what it costs when the chosen response becomes less likely than under the reference.
    """

    penalty: NotNegative = 50.0

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen - rejected - self.penalty * torch.relu(-chosen))


@dataclass(frozen=True)
class RPO(Objective):
    """DPO and the chosen response's likelihood (Pang et al. 2024, "Iterative Reasoning Preference
    Optimization", arXiv:2404.19733, eq. 1): −log σ(r_c − r_r) − α log π(chosen) / |chosen|.
    """

    beta: Positive = 0.1
    alpha: NotNegative = 1.0

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        likelihood = _a_token(logprobs)[:, 0]
        loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]) - self.alpha * likelihood
        return Loss(loss, preference_metrics(rewards, logprobs))


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: the mean negative log-likelihood of a scored token, −Σ log π(token) / Σ tokens.

    The mean is over the step's tokens, so a long response weighs more than a short one, as is usual.
    """

    sides = ("response",)
    records = "demonstrations"

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def __call__(self, logprobs: LogProbs) -> Loss:
        policy = logprobs.policy[:, 0]
        return Loss(-policy * _examples_a_token(logprobs), {"logps/response": policy.detach()})


@dataclass(frozen=True)
class ChosenSFT(Objective):
    """SFT on the chosen responses of pairs: the term that RPO and MPO add to a preference loss. A mean over
    the step's chosen tokens.
    """

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def __call__(self, logprobs: LogProbs) -> Loss:
        loss = -logprobs.policy[:, 0] * _examples_a_token(logprobs)
        return Loss(loss, {"logps/chosen": logprobs.policy[:, 0].detach()})


@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, eq. 6), without a reference:
    −log σ(β (log π(c)/|c| − log π(r)/|r|) − γ).

    target: γ / β, the margin that log-probs a token are to reach, as the authors tune it.
    """

    beta: Positive = 2.0
    target: NotNegative = 0.5

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * _a_token(logprobs)
        margin = rewards[:, 0] - rewards[:, 1] - self.beta * self.target
        return Loss(-logsigmoid(margin), preference_metrics(rewards, logprobs))


@dataclass(frozen=True)
class CPO(Objective):
    """Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417, eq. 5), without a reference:
    −log σ(β (log π(c) − log π(r))) − α log π(c) / |c|.

    The likelihood is taken a token, so that alpha means the same for long and short responses.
    """

    beta: Positive = 0.1
    alpha: NotNegative = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.policy
        loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]) - self.alpha * _a_token(logprobs)[:, 0]
        return Loss(loss, preference_metrics(rewards, logprobs))


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, eqs. 5 to 7), without a
    reference: −log π(c)/|c| − λ log σ(log odds(c) − log odds(r)), odds = p / (1 − p), log p = log π(y)/|y|.

    weight λ: of the odds ratio against the likelihood.
    """

    weight: Positive = 0.1

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def __call__(self, logprobs: LogProbs) -> Loss:
        log_p = _a_token(logprobs)
        # log(1 − p) by expm1: p close to 1 would cancel.
        log_odds = log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-12)))
        odds_ratio = log_odds[:, 0] - log_odds[:, 1]
        loss = -log_p[:, 0] - self.weight * logsigmoid(odds_ratio)
        return Loss(loss, preference_metrics(self.weight * log_p, logprobs))


def _a_token(logprobs: LogProbs) -> Tensor:
    """log π(side) / |side|, float64 [B, k]."""
    return logprobs.policy / logprobs.lengths.clamp(min=1)


def _examples_a_token(logprobs: LogProbs) -> float:
    """What turns the mean over the step's examples into the one over its first side's tokens."""
    return logprobs.step.examples / max(1, logprobs.step.tokens[0])
