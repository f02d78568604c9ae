"""The base alone again after adapters: the same weights in the same memory, for the next ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_dpo.errors import ModelError
from lora_dpo.model.roles import Model
from lora_dpo.model.score import SCORE, is_score_head
from lora_dpo.ways import use_attention


def bare(model: Model) -> Model:
    """The model with every adapter taken off its base, and layers no longer recomputed.

    Nothing is copied and no weight is written: what peft put around a module goes, the module stays. Whoever
    still holds a model with adapters on this base must not use it any more.
    """
    network: Any = model.causal
    _unwrap(network)
    vars(network).pop("peft_config", None)
    if is_score_head(getattr(network, SCORE, None)):
        delattr(network, SCORE)  # a reward model's, and no part of the base
    for layer in dataclasses.replace(model, network=network).checkpointed_layers:
        layer.gradient_checkpointing = False
    use_attention(network, model.way)
    return Model(
        network,
        model.tokenizer,
        model.compute_dtype,
        model.verdict,
        unquantized=model.unquantized,
        base=model.base,
    )


def _unwrap(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        inner = _inner(child)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap(inner)


def _inner(module: nn.Module) -> nn.Module:
    """What peft's wrappers are around, however many there are."""
    while True:
        if isinstance(module, ParamWrapper):
            # It reaches the experts' parameter by a parametrization, which is there in a forward pass only.
            module = module.base_layer
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module  # pyright: ignore[reportAssignmentType]
        else:
            return module


def check_bare(model: Model) -> None:
    """Raise ModelError where an adapter is on a model that is to be the base alone."""
    wrapped = any(
        isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.network.modules()
    )
    if wrapped or isinstance(model.network, PeftModel):
        raise ModelError("the model in memory has adapters on: take them off first, with lora_dpo.model.bare")
