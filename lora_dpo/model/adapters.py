"""Making, loading and saving adapters on the one base.

What is added here is exactly nothing in the beginning, and nothing at all when it is switched off: that is
what makes the base its reference.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ModelError
from lora_dpo.model.dora import start_magnitudes
from lora_dpo.model.initial import save_doubled, start_from_base, start_tensors
from lora_dpo.model.low_rank import INITIAL
from lora_dpo.model.roles import Model, with_adapter
from lora_dpo.model.saved import adapter_tensors, write_adapter
from lora_dpo.model.score import SCORE, add_score_head, tell_task
from lora_dpo.model.targets import (
    adapted_modules,
    check_experts,
    not_plain,
    patterns,
    saved_modules,
    target_modules,
    token_ids,
)
from lora_dpo.recipe import Adapter

TRAINED = "default"
"""PEFT's name for the adapter that is trained."""


def add_adapter(model: Model, adapter: Adapter, *, seed: int = 0, rewards: bool = False) -> Model:
    """A fresh adapter in float32 on the base; only its parameters require gradients.

    adapter.init=eva starts as the default does; `training.eva` then gives A its values. rewards: with a score
    head of zeros, as a reward model. Raises ModelError where the adapter names what the base doesn't have, or
    what couldn't be merged.
    """
    if rewards:
        add_score_head(model.causal)
    config = _peft_config(model, adapter, [SCORE] if rewards else [])
    # The seed stands right before the adapter is made: whatever loaded before it can't move its values.
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # peft asks transformers about checkpointing by an older name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            network = get_peft_model(model.causal, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"adapter.targets {adapter.targets}: {error}") from error
    tell_task(network, TRAINED)
    policy = (TRAINED,)
    if adapter.init in ("pissa", "olora"):
        start_from_base(network, adapter.init)
        policy = (TRAINED, INITIAL)
    adapted = with_adapter(network, model, policy_adapters=policy)
    start_magnitudes(adapted.adapter_layers)
    _refuse_unmergeable(adapted)
    return adapted


def _peft_config(model: Model, adapter: Adapter, heads: list[str]) -> LoraConfig:
    """heads: modules that are trained in full besides those that the adapter names."""
    network = model.causal
    targets = target_modules(network, adapter)
    adapted = adapted_modules(network, adapter)
    check_experts(network, adapter)
    options: dict[str, Any] = {"lora_alpha": adapter.alpha}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        rank_pattern=patterns(adapter, "ranks", adapted),
        alpha_pattern=patterns(adapter, "alphas", adapted),
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=not_plain(network) if targets == "all-linear" else None,
        target_parameters=list(adapter.expert_targets) or None,
        modules_to_save=list(dict.fromkeys([*saved_modules(network, adapter), *heads])) or None,
        trainable_token_indices=_tokens(model, adapter),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        # GPT-2's Conv1D keeps its weight transposed; quantized, it is an ordinary linear layer.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        **options,
    )


def _tokens(model: Model, adapter: Adapter) -> list[int] | None:
    if not adapter.trained_tokens:
        return None
    embeddings: Any = model.causal.get_input_embeddings()
    return token_ids(adapter.trained_tokens, model.tokenizer, embeddings.weight.shape[0])


def _refuse_unmergeable(model: Model) -> None:
    """Adapters on embeddings, or on a head tied to them, would be lost in a merged export: refuse them
    here.
    """
    for layer in model.adapter_layers:
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Embedding):
            raise ModelError(
                "adapter.targets names an embedding; it takes linear layers. adapter.trained_tokens trains"
                " embeddings of some tokens"
            )
    if model.head in model.adapter_layers and model.causal.config.get_text_config().tie_word_embeddings:
        raise ModelError("adapter.targets names the head, which is tied to the embeddings in this model")


def save_adapter(model: Model, folder: Path, name: str = TRAINED) -> None:
    """An adapter as others load it, in PEFT's layout; with a start that is subtracted, as one of twice the
    rank.

    name: PEFT's, of the one that is trained or of another that has the same start.
    """
    network = _save(model, folder, name)
    if INITIAL in model.policy_adapters:
        save_doubled(network, folder, name, adapter_tensors(network, name))


def save_for_resuming(model: Model, folder: Path, name: str = TRAINED) -> None:
    """An adapter as it is in memory, and beside it what it started from."""
    network = _save(model, folder, name)
    if INITIAL in model.policy_adapters:
        start = {key: tensor.contiguous() for key, tensor in start_tensors(network).items()}
        save_file(start, folder / f"{INITIAL}.safetensors")


def _save(model: Model, folder: Path, name: str) -> PeftModel:
    assert isinstance(model.network, PeftModel)
    if model.base is not None:
        model.network.peft_config[name].revision = model.base.revision
    if name == TRAINED:
        # Without the flag peft asks the hub whether the base's vocabulary was resized.
        model.network.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    else:
        write_adapter(model.network, name, folder)  # peft would write it one folder deeper
    return model.network
