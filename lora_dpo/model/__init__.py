"""The one 4-bit base, the adapter on it, and the roles that they play together."""

from lora_dpo.model.base import load_base, load_config, load_tokenizer, pick_compute_dtype, pick_device
from lora_dpo.model.roles import (
    Model,
    add_adapter,
    as_policy,
    as_reference,
    generating,
    load_adapter,
    load_model,
    without_dropout,
)

__all__ = [
    "Model",
    "add_adapter",
    "as_policy",
    "as_reference",
    "generating",
    "load_adapter",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "pick_compute_dtype",
    "pick_device",
    "without_dropout",
]
