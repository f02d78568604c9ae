"""Objectives of one margin: how much more the policy prefers the chosen response than its reference does.

margin = β (s(chosen) − s(rejected)) − offset · δ, with s = f'(π / ref) for a divergence f: the log-ratio
itself for reverse KL. `average` divides each s by its response's length. δ is the row's `margin` column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.bounds import AtLeast
from lora_dpo.losses.objective import (
    LogProbs,
    Loss,
    NotNegative,
    Objective,
    Positive,
    Share,
    Smoothing,
    preference_metrics,
)

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]

LARGEST_EXPONENT = 80.0
"""Powers of a probability ratio stop growing here, before a float32 copy of them would be infinite."""


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(exp(log_ratio)) with f'(1) = 0, for f-DPO (Wang et al. 2024, arXiv:2309.16240, table 1).

    log_ratio: float, any shape. alpha: of the α-divergence, whose f'(u) is (1 − u^−α) / α; it goes over into
    reverse KL at 0 and is forward KL at 1. (TRL's coefficient is 1 − alpha.)
    """
    if divergence == "jensen_shannon":
        return math.log(2) + logsigmoid(log_ratio)
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(divergence, alpha)
    if alpha == 0:
        return log_ratio
    return -torch.expm1((-alpha * log_ratio).clamp(max=LARGEST_EXPONENT)) / alpha


@dataclass(frozen=True)
class Margin(Objective):
    """What objectives of the margin share; alone it is none.

    beta: how strongly the policy is held to the reference; smaller lets it move further. divergence: what
    holds it (Wang et al. 2024, arXiv:2309.16240); alpha: of the "alpha" one. average: log-ratios a token
    instead of a response. offset: how much of the row's `margin` the margin must exceed (ODPO, Amini et al.
    2024, arXiv:2402.10571, eq. 8).
    """

    beta: Positive = 0.1
    divergence: Divergence = "reverse_kl"
    alpha: Share = 0.5
    average: bool = False
    offset: NotNegative = 0.0

    def scores(self, logprobs: LogProbs) -> Tensor:
        """s of both sides, float64 [B, 2]."""
        scores = divergence_score(logprobs.log_ratio, self.divergence, self.alpha)
        return scores / logprobs.lengths.clamp(min=1) if self.average else scores

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * self.scores(logprobs)
        margin = rewards[:, 0] - rewards[:, 1]
        if self.offset and "margin" in logprobs.values:
            margin = margin - self.offset * logprobs.values["margin"]
        return Loss(self.of_margin(margin), preference_metrics(rewards, logprobs))

    def of_margin(self, margin: Tensor) -> Tensor:
        """The loss of each pair [B] from its margin [B]."""
        raise NotImplementedError


@dataclass(frozen=True)
class DPO(Margin):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    −log σ(β[(log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))])

    label_smoothing ε: the share of labels that are taken to be wrong, (1 − ε)(−log σ(m)) + ε(−log σ(−m)):
    conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """

    label_smoothing: Smoothing = 0.0

    def of_margin(self, margin: Tensor) -> Tensor:
        loss = -logsigmoid(margin)
        if not self.label_smoothing:
            return loss
        return (1 - self.label_smoothing) * loss - self.label_smoothing * logsigmoid(-margin)


@dataclass(frozen=True)
class IPO(Margin):
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h − 1/(2β))².

    h is the difference of log-ratios; β is the paper's τ. By default log-ratios are taken a token, as the
    authors ran it: 1/(2β) nats would otherwise be a goal for long and short responses alike.
    """

    average: bool = True

    def __call__(self, logprobs: LogProbs) -> Loss:
        scores = self.scores(logprobs)
        difference = scores[:, 0] - scores[:, 1]
        if self.offset and "margin" in logprobs.values:
            difference = difference - self.offset * logprobs.values["margin"]
        loss = (difference - 1 / (2 * self.beta)) ** 2
        return Loss(loss, preference_metrics(self.beta * scores, logprobs))


@dataclass(frozen=True)
class Hinge(Margin):
    """SLiC's hinge on the margin (Zhao et al. 2023, arXiv:2305.10425; as in RSO, Liu et al. 2024,
    arXiv:2309.06657, eq. 9): max(0, 1 − m). A pair that is 1 apart is left alone.
    """

    def of_margin(self, margin: Tensor) -> Tensor:
        return torch.relu(1 - margin)


@dataclass(frozen=True)
class RobustDPO(Margin):
    """DPO whose expectation under flipped labels is DPO's without (Chowdhury et al. 2024, arXiv:2403.00409,
    eq. 12): [(1 − ε)(−log σ(m)) − ε(−log σ(−m))] / (1 − 2ε).

    label_smoothing ε: the share of labels that are flipped, below ½.
    """

    label_smoothing: Annotated[float, AtLeast(0, high=0.499)] = 0.1

    def of_margin(self, margin: Tensor) -> Tensor:
        epsilon = self.label_smoothing
        return (-(1 - epsilon) * logsigmoid(margin) + epsilon * logsigmoid(-margin)) / (1 - 2 * epsilon)


@dataclass(frozen=True)
class EXO(Margin):
    """Efficient exact optimization for pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16): the reverse KL from
    the softmax of the policy's rewards to labels (1 − ε, ε), Σ_i q_i (log q_i − log p_i), q = (σ(m), σ(−m)).

    label_smoothing ε > 0: with sure labels the divergence would be infinite.
    """

    label_smoothing: Annotated[float, AtLeast(0, high=0.5, exclusive=True)] = 1e-3

    def of_margin(self, margin: Tensor) -> Tensor:
        log_q, log_other = logsigmoid(margin), logsigmoid(-margin)
        epsilon = self.label_smoothing
        chosen = log_q.exp() * (log_q - math.log1p(-epsilon))
        return chosen + log_other.exp() * (log_other - math.log(epsilon))


@dataclass(frozen=True)
class DiscoPOP(Margin):
    """The log-ratio modulated loss that was found by search (Lu et al. 2024, arXiv:2406.08414, eq. 5):
    (1 − w)(−log σ(m)) + w exp(−m), with w = σ(m / τ).

    tau: at most 1; above, the loss of very wrong pairs would grow without end.
    """

    tau: Annotated[float, AtLeast(0, high=1, exclusive=True)] = 0.05

    def of_margin(self, margin: Tensor) -> Tensor:
        weight = torch.sigmoid(margin / self.tau)
        # The product as one power: its factors would be 0 and ∞ for a very wrong pair.
        product = torch.exp(logsigmoid(margin / self.tau) - margin)
        return (1 - weight) * -logsigmoid(margin) + product
