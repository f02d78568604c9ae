"""Objectives: the log-probs of a step in, one loss an example out. Pure, unreduced, cited.

Legend: `B` examples (pairs, for DPO), `k` sides of an example.

An objective is a frozen dataclass. What it needs it declares as data, and the trainer gives it; the trainer
never asks for an objective's name:

`records`          what the data are read as: "pairs", "demonstrations" or "ratings"
`sides`            the names of an example's sides: two of a pair, the response of a demonstration, the
                   completion of a rating and the mismatched one
`needs_reference`  whether reference log-probs are computed
`count(lengths)`   what the sum of the step's losses is divided by

Every term is a sum over the step's examples divided by that count, so the gradient of a step does not
depend on how its examples were packed into micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.errors import RecipeError

Records = Literal["pairs", "demonstrations", "ratings"]


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log-probs of B examples with k sides each, summed over scored tokens.

    policy: float64 [B, k], carries the gradient. reference: float64 [B, k] without gradient, or None for an
    objective that needs none. lengths: int64 [B, k], the number of scored tokens.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log π(side) − log ref(side), [B, k]; β times it is the implicit reward (Rafailov et al. 2023, eq.
        5).
        """
        if self.reference is None:
            raise ValueError("this objective declared that it needs no reference, and then asked for one")
        return self.policy - self.reference


@dataclass(frozen=True, eq=False)
class Loss:
    """per_example: float [B], differentiable. metrics: name → float [B], detached; the trainer averages
    them.
    """

    per_example: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What the trainer knows of an objective."""

    records: ClassVar[Records]
    sides: ClassVar[tuple[str, ...]]
    needs_reference: ClassVar[bool]

    def count(self, lengths: Tensor) -> float:
        """The divisor of the step's summed losses, from lengths int64 [B, k] of the whole step."""
        ...

    def __call__(self, logprobs: LogProbs) -> Loss: ...


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    −log σ(β[(log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))])

    beta: how strongly the policy is held to the reference; smaller lets it move further.
    """

    beta: float = 0.1
    records: ClassVar[Records] = "pairs"
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not (number and 0 < self.beta < float("inf")):
            raise RecipeError(f"loss.beta got {self.beta!r}; it takes a number greater than 0")

    def count(self, lengths: Tensor) -> float:
        return float(lengths.shape[0])

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        margin = rewards[:, 0] - rewards[:, 1]
        return Loss(-logsigmoid(margin), preference_metrics(rewards.detach(), logprobs))


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: the mean negative log-likelihood of a scored token, −Σ log π(token) / Σ tokens.

    The mean is over the step's tokens, so a long response weighs more than a short one, as is usual.
    """

    records: ClassVar[Records] = "demonstrations"
    sides: ClassVar[tuple[str, ...]] = ("response",)
    needs_reference: ClassVar[bool] = False

    def count(self, lengths: Tensor) -> float:
        return float(lengths.sum())

    def __call__(self, logprobs: LogProbs) -> Loss:
        policy = logprobs.policy[:, 0]
        return Loss(-policy, {"logps/response": policy.detach()})


def preference_metrics(rewards: Tensor, logprobs: LogProbs) -> dict[str, Tensor]:
    """What is recorded of a pair: rewards float [B, 2] are implicit rewards, β times the log-ratio.

    A pair whose rewards tie counts as half right, so that an untrained policy stands at 0.5.
    """
    chosen, rejected = rewards.unbind(1)
    policy = logprobs.policy.detach()
    change = logprobs.log_ratio.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": preferred(chosen, rejected),
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
        "logps/chosen_change": change[:, 0],
        "logps/rejected_change": change[:, 1],
    }


def preferred(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where chosen is greater, 0 where rejected is, ½ at a tie; what is not a number stays so."""
    difference = chosen - rejected
    return torch.where(difference.isnan(), difference, 0.5 * (torch.sign(difference) + 1))


OBJECTIVES: dict[str, type[Objective]] = {"DPO": DPO, "SFT": SFT}
"""The objectives a recipe can name, by name."""
