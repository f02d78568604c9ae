"""Objectives: the log-probs of a step in, one loss an example out.

`margin` holds the ones people use most; `paired`, `tokenwise` and `whole_step` the rest, by what they look
at; `reward` those of a reward model.
"""

from lora_dpo.losses.margin import DPO, EXO, IPO, DiscoPOP, Hinge, RobustDPO
from lora_dpo.losses.objective import (
    DEFAULT_VALUES,
    LogProbs,
    Loss,
    Needs,
    Objective,
    Positive,
    TokenLogProbs,
    Totals,
    preference_metrics,
    preferred,
    reward_metrics,
    weighted,
)
from lora_dpo.losses.paired import CPO, DPOP, NCA, ORPO, RPO, SFT, SPPO, APODown, APOZero, ChosenSFT, SimPO
from lora_dpo.losses.reward import BradleyTerry
from lora_dpo.losses.sums import Sum
from lora_dpo.losses.tokenwise import LDDPO, TDPO, WPO
from lora_dpo.losses.whole_step import AOT, BCO, KTO, BetaDPO

_ALL = (
    *(DPO, IPO, Hinge, RobustDPO, EXO, DiscoPOP),
    *(SFT, ChosenSFT, SimPO, ORPO, CPO, RPO, DPOP, NCA, SPPO, APOZero, APODown),
    *(LDDPO, WPO, TDPO),
    *(AOT, BCO, BetaDPO, KTO),
    BradleyTerry,
    Sum,
)

OBJECTIVES: dict[str, type[Objective]] = {kind.__name__: kind for kind in _ALL}
"""The objectives a recipe can name, by name; others it names by their file or module, `losses.py:Mine`."""

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DEFAULT_VALUES",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "KTO",
    "LDDPO",
    "NCA",
    "OBJECTIVES",
    "ORPO",
    "RPO",
    "SFT",
    "SPPO",
    "TDPO",
    "WPO",
    "APODown",
    "APOZero",
    "BetaDPO",
    "BradleyTerry",
    "ChosenSFT",
    "DiscoPOP",
    "Hinge",
    "LogProbs",
    "Loss",
    "Needs",
    "Objective",
    "Positive",
    "RobustDPO",
    "SimPO",
    "Sum",
    "TokenLogProbs",
    "Totals",
    "preference_metrics",
    "preferred",
    "reward_metrics",
    "weighted",
]
