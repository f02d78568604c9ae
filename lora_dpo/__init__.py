"""Parameter-efficient Direct Preference Optimization: one 4-bit base, adapters as policy and reference.

The public names load on first use, so that `import lora_dpo` and `lora-dpo --help` take no time.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dpo.batching import MicroBatch, StepSampler, pack
    from lora_dpo.cli import run
    from lora_dpo.errors import UserError
    from lora_dpo.evaluation import evaluate
    from lora_dpo.export import export_adapter, export_merged
    from lora_dpo.finished import evaluate_run, open_finished, side_by_side
    from lora_dpo.judging import judge_file, make_judge, pair_file
    from lora_dpo.logprobs import token_logprobs
    from lora_dpo.losses import (
        AOT,
        BCO,
        CPO,
        DPO,
        DPOP,
        EXO,
        IPO,
        KTO,
        LDDPO,
        NCA,
        ORPO,
        RPO,
        SFT,
        SPPO,
        TDPO,
        WPO,
        APODown,
        APOZero,
        BetaDPO,
        BradleyTerry,
        ChosenSFT,
        DiscoPOP,
        Hinge,
        LogProbs,
        Loss,
        Needs,
        Objective,
        RobustDPO,
        SimPO,
        Sum,
        preference_metrics,
    )
    from lora_dpo.model import load_model
    from lora_dpo.preferences import Preference, Rating, load_preferences, load_ratings
    from lora_dpo.recipe import (
        Adapter,
        Base,
        Data,
        IterativeRecipe,
        Judge,
        Pairing,
        Recipe,
        Reference,
        Rounds,
        Sampling,
        Shift,
        Source,
        Training,
        load_recipe,
    )
    from lora_dpo.reference import reference_logprobs
    from lora_dpo.reward import RewardModel, train_reward
    from lora_dpo.rounds import run_rounds
    from lora_dpo.sampling import sample
    from lora_dpo.shift import measure_shift
    from lora_dpo.tokenization import ChatTokenizer, tokenize
    from lora_dpo.training import Record, preflight, train

__version__ = "0.1.0"

# The package `kernels` downloads code and runs it; transformers and bitsandbytes do without where it is not.
sys.modules.setdefault("kernels", None)  # pyright: ignore[reportArgumentType]
os.environ.setdefault("USE_HUB_KERNELS", "NO")
# Nor is a model with pickled weights to be taken from a converted copy that a third party uploaded.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# bitsandbytes recommends a package that downloads code at run time; the kernels it has are used instead.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))

_HOMES = {
    "batching": ("MicroBatch", "StepSampler", "pack"),
    "cli": ("run",),
    "errors": ("UserError",),
    "evaluation": ("evaluate",),
    "export": ("export_adapter", "export_merged"),
    "finished": ("evaluate_run", "open_finished", "side_by_side"),
    "judging": ("judge_file", "make_judge", "pair_file"),
    "logprobs": ("token_logprobs",),
    "losses": (
        "AOT",
        "BCO",
        "CPO",
        "DPO",
        "DPOP",
        "EXO",
        "IPO",
        "KTO",
        "LDDPO",
        "NCA",
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
        "RobustDPO",
        "SimPO",
        "Sum",
        "preference_metrics",
    ),
    "model": ("load_model",),
    "preferences": ("Preference", "Rating", "load_preferences", "load_ratings"),
    "recipe": (
        "Adapter",
        "Base",
        "Data",
        "IterativeRecipe",
        "Judge",
        "Pairing",
        "Recipe",
        "Reference",
        "Rounds",
        "Sampling",
        "Shift",
        "Source",
        "Training",
        "load_recipe",
    ),
    "reference": ("reference_logprobs",),
    "reward": ("RewardModel", "train_reward"),
    "rounds": ("run_rounds",),
    "sampling": ("sample",),
    "shift": ("measure_shift",),
    "tokenization": ("ChatTokenizer", "tokenize"),
    "training": ("Record", "preflight", "train"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "KTO",
    "LDDPO",
    "NCA",
    "ORPO",
    "RPO",
    "SFT",
    "SPPO",
    "TDPO",
    "WPO",
    "APODown",
    "APOZero",
    "Adapter",
    "Base",
    "BetaDPO",
    "BradleyTerry",
    "ChatTokenizer",
    "ChosenSFT",
    "Data",
    "DiscoPOP",
    "Hinge",
    "IterativeRecipe",
    "Judge",
    "LogProbs",
    "Loss",
    "MicroBatch",
    "Needs",
    "Objective",
    "Pairing",
    "Preference",
    "Rating",
    "Recipe",
    "Record",
    "Reference",
    "RewardModel",
    "RobustDPO",
    "Rounds",
    "Sampling",
    "Shift",
    "SimPO",
    "Source",
    "StepSampler",
    "Sum",
    "Training",
    "UserError",
    "evaluate",
    "evaluate_run",
    "export_adapter",
    "export_merged",
    "judge_file",
    "load_model",
    "load_preferences",
    "load_ratings",
    "load_recipe",
    "make_judge",
    "measure_shift",
    "open_finished",
    "pack",
    "pair_file",
    "preference_metrics",
    "preflight",
    "reference_logprobs",
    "run",
    "run_rounds",
    "sample",
    "side_by_side",
    "token_logprobs",
    "tokenize",
    "train",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
