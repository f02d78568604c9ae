"""Parameter-efficient Direct Preference Optimization: one 4-bit base, adapters as policy and reference.

The public names load on first use, so that `import lora_dpo` and `lora-dpo --help` take no time.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dpo.batching import MicroBatch, StepSampler, pack
    from lora_dpo.cli import run
    from lora_dpo.errors import UserError
    from lora_dpo.evaluation import evaluate
    from lora_dpo.export import export_adapter, export_merged
    from lora_dpo.finished import evaluate_run, open_finished, side_by_side
    from lora_dpo.logprobs import token_logprobs
    from lora_dpo.losses import DPO, SFT, LogProbs, Loss, Objective
    from lora_dpo.model import load_model
    from lora_dpo.preferences import Preference, load_preferences
    from lora_dpo.recipe import Adapter, Base, Data, Recipe, Reference, Source, Training, load_recipe
    from lora_dpo.reference import reference_logprobs
    from lora_dpo.tokenization import ChatTokenizer, tokenize
    from lora_dpo.training import Record, preflight, train

__version__ = "0.1.0"

# bitsandbytes recommends a package that downloads code at run time; the kernels it has are used instead.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))

_HOMES = {
    "batching": ("MicroBatch", "StepSampler", "pack"),
    "cli": ("run",),
    "errors": ("UserError",),
    "evaluation": ("evaluate",),
    "export": ("export_adapter", "export_merged"),
    "finished": ("evaluate_run", "open_finished", "side_by_side"),
    "logprobs": ("token_logprobs",),
    "losses": ("DPO", "SFT", "LogProbs", "Loss", "Objective"),
    "model": ("load_model",),
    "preferences": ("Preference", "load_preferences"),
    "recipe": ("Adapter", "Base", "Data", "Recipe", "Reference", "Source", "Training", "load_recipe"),
    "reference": ("reference_logprobs",),
    "tokenization": ("ChatTokenizer", "tokenize"),
    "training": ("Record", "preflight", "train"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DPO",
    "SFT",
    "Adapter",
    "Base",
    "ChatTokenizer",
    "Data",
    "LogProbs",
    "Loss",
    "MicroBatch",
    "Objective",
    "Preference",
    "Recipe",
    "Record",
    "Reference",
    "Source",
    "StepSampler",
    "Training",
    "UserError",
    "evaluate",
    "evaluate_run",
    "export_adapter",
    "export_merged",
    "load_model",
    "load_preferences",
    "load_recipe",
    "open_finished",
    "pack",
    "preflight",
    "reference_logprobs",
    "run",
    "side_by_side",
    "token_logprobs",
    "tokenize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
