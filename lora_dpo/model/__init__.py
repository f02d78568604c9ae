"""The one 4-bit base, the adapters on it, and the roles that they play together."""

from lora_dpo.model.adapters import add_adapter, save_adapter, save_for_resuming
from lora_dpo.model.base import load_base, load_config, load_tokenizer, pick_compute_dtype, pick_device
from lora_dpo.model.dora import SMALLEST_NORM, dora_matrix
from lora_dpo.model.loading import POLICY, REFERENCE, load_adapter, load_model, sync_reference
from lora_dpo.model.low_rank import INITIAL
from lora_dpo.model.roles import Model, as_base, as_policy, as_reference, generating, without_dropout
from lora_dpo.model.saved import adapter_tensors, write_adapter
from lora_dpo.model.weights import dequantized

__all__ = [
    "INITIAL",
    "POLICY",
    "REFERENCE",
    "SMALLEST_NORM",
    "Model",
    "adapter_tensors",
    "add_adapter",
    "as_base",
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
    "sync_reference",
    "without_dropout",
    "write_adapter",
]
