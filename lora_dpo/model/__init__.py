"""The one 4-bit base, the adapter on it, and the roles that they play together."""

from lora_dpo.model.adapters import (
    adapter_tensors,
    add_adapter,
    load_adapter,
    load_model,
    save_adapter,
    save_for_resuming,
)
from lora_dpo.model.base import load_base, load_config, load_tokenizer, pick_compute_dtype, pick_device
from lora_dpo.model.dora import dora_matrix
from lora_dpo.model.low_rank import INITIAL
from lora_dpo.model.roles import Model, as_policy, as_reference, generating, without_dropout
from lora_dpo.model.weights import dequantized

__all__ = [
    "INITIAL",
    "Model",
    "adapter_tensors",
    "add_adapter",
    "as_policy",
    "as_reference",
    "dequantized",
    "dora_matrix",
    "generating",
    "load_adapter",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "pick_compute_dtype",
    "pick_device",
    "save_adapter",
    "save_for_resuming",
    "without_dropout",
]
