"""Objectives of a reward model: the rewards of two responses in, how well they tell which one is preferred.

Such an objective's log-probs are none: `LogProbs.policy` [B, 2] holds what the score head gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from lora_dpo.losses.objective import (
    LogProbs,
    Loss,
    Needs,
    NotNegative,
    Objective,
    Smoothing,
    reward_metrics,
)


@dataclass(frozen=True)
class BradleyTerry(Objective):
    """A reward model of pairs (Bradley & Terry 1952; for responses Ouyang et al. 2022, arXiv:2203.02155, eq.
    1): −log σ(r(chosen) − r(rejected)).

    offset: how much of the row's `margin` the difference of rewards must exceed, −log σ(Δr − offset · δ)
    (Touvron et al. 2023, arXiv:2307.09288, eq. 2). centering: adds centering · (r(chosen) + r(rejected))², so
    that rewards, of which the loss sees differences only, stay around 0 (Eisenstein et al. 2023,
    arXiv:2312.09244); 0.01 is usual. label_smoothing ε: the share of labels that are taken to be wrong, (1 −
    ε)(−log σ(m)) + ε(−log σ(−m)), as in DPO.
    """

    offset: NotNegative = 0.0
    centering: NotNegative = 0.0
    label_smoothing: Smoothing = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(reference=False, rewards=True)

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = logprobs.policy
        margin = rewards[:, 0] - rewards[:, 1]
        if self.offset and "margin" in logprobs.values:
            margin = margin - self.offset * logprobs.values["margin"]
        loss = -logsigmoid(margin)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * logsigmoid(-margin)
        if self.centering:
            loss = loss + self.centering * rewards.sum(dim=1) ** 2
        return Loss(loss, reward_metrics(rewards))
