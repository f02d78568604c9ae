"""Which adapters llama.cpp has a place for, and a copy of one with its scale where llama.cpp looks for it.

llama.cpp adds alpha / rank · B A to a weight, with one alpha for the whole file and each tensor's own rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dpo.errors import ModelError
from lora_dpo.export.gguf.tensors import Stored

PREFIX = "base_model.model."
A_ENDINGS, B_ENDINGS = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")

_KINDS = {
    "use_dora": "DoRA scales the columns of the whole weight, and llama.cpp knows sums of factors only",
    "modules_to_save": "whole modules were trained beside the factors (modules_to_save)",
    "trainable_token_indices": "single rows of the embeddings were trained (trainable_token_indices)",
    "target_parameters": "it has factors for experts' parameters (target_parameters)",
    "lora_bias": "its factors have biases (lora_bias)",
    "layer_replication": "it repeats layers of the base (layer_replication)",
    "alora_invocation_tokens": "it is on for a part of the tokens only (alora_invocation_tokens)",
    "fan_in_fan_out": "the base keeps its weights transposed (fan_in_fan_out), which is not heeded there",
}


def check_convertible(
    config: Mapping[str, Any], entries: Mapping[str, Stored], tied: bool, adapter: Path
) -> None:
    """Raise ModelError for an adapter that the converter refuses, or converts to something else.

    config: adapter_config.json. entries: the adapter's tensors. tied: whether the base's embeddings
    are its head.
    """
    reason = next((why for key, why in _KINDS.items() if config.get(key)), None)
    if reason is None and config.get("bias") not in (None, "none"):
        reason = "biases of the base were trained (bias)"
    if reason is None:
        reason = _unplaced(list(entries), tied)
    if reason is not None:
        raise ModelError(
            f"the adapter in {adapter} can't be a GGUF adapter: {reason}. --to gguf merges it into a whole"
            " model instead"
        )


def _unplaced(names: list[str], tied: bool) -> str | None:
    for name in names:
        module = module_of(name)
        if name.endswith(".base_layer.weight"):
            return (
                f"it brings whole weights along ({name}; peft's save_embedding_layers=False leaves them out)"
            )
        if module is None:
            return f"{name} is no factor of LoRA's"
        if ".experts." in name:
            return f"{name} belongs to one of many experts, which a GGUF file keeps as one tensor"
        last = module.rpartition(".")[2]
        if tied and last == "lm_head":
            return "it changes the head, which in a GGUF of this base is the embeddings' own tensor"
        if tied and ".lora_embedding_" in name:
            # llama.cpp would multiply the head by those factors too, and abort.
            return "it changes the embeddings, which in a GGUF of this base are the head's tensor too"
    return None


def module_of(name: str) -> str | None:
    """The module of the base that a factor belongs to; None for what is no factor."""
    for ending in (*A_ENDINGS, *B_ENDINGS):
        if name.endswith(ending):
            return name.removeprefix(PREFIX).removesuffix(ending)
    return None


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What a module's B A is multiplied with, as peft has it."""
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), module)
    alpha = patterns.get(key, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def prepare(adapter: Path, config: Mapping[str, Any], folder: Path) -> None:
    """Write a copy whose scale is alpha / rank for every module: float32 factors, one alpha.

    rsLoRA's scale goes into alpha. Modules whose alpha still differs from the most frequent one have their B
    multiplied, which rounds it unless the quotient is a power of two. Raises OSError, SafetensorError.
    """
    tensors = {
        name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        module = module_of(name)
        if module is not None and name.endswith(A_ENDINGS):
            rank = tensor.shape[0]
            alphas[module] = scale_of(config, module, rank) * rank
    values = list(alphas.values())
    common = max(set(values), key=lambda alpha: (values.count(alpha), alpha))
    for name, tensor in tensors.items():
        module = module_of(name)
        if module is not None and name.endswith(B_ENDINGS) and alphas[module] != common:
            tensors[name] = tensor * (alphas[module] / common)
    _write(folder, tensors, config, common)


def _write(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], alpha: float) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    own = {"lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **own}, indent=1), encoding="utf-8")
