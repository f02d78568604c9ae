"""The one 4-bit base, the adapters on it, and the roles that they play together."""

from lora_dpo.model.adapters import add_adapter, save_adapter, save_for_resuming
from lora_dpo.model.bare import bare
from lora_dpo.model.base import load_base, load_config, load_tokenizer, pick_compute_dtype, pick_device
from lora_dpo.model.dora import SMALLEST_NORM, dora_matrix
from lora_dpo.model.loading import (
    POLICY,
    REFERENCE,
    REWARD,
    check_early,
    load_adapter,
    load_model,
    put_reward,
    sync_reference,
)
from lora_dpo.model.low_rank import INITIAL
from lora_dpo.model.roles import (
    Model,
    as_base,
    as_policy,
    as_reference,
    as_reward,
    generating,
    without_dropout,
)
from lora_dpo.model.saved import adapter_tensors, find_adapter, read_adapter, write_adapter
from lora_dpo.model.score import is_score_head, score_weight
from lora_dpo.model.stored import Stored, read_header, weight_files
from lora_dpo.model.trained_on import (
    RECORD,
    TrainedOn,
    check_base,
    content_hash,
    read_record,
    record_notes,
    record_of,
    template_hash,
    write_record,
)
from lora_dpo.model.weights import dequantized

__all__ = [
    "INITIAL",
    "POLICY",
    "RECORD",
    "REFERENCE",
    "REWARD",
    "SMALLEST_NORM",
    "Model",
    "Stored",
    "TrainedOn",
    "adapter_tensors",
    "add_adapter",
    "as_base",
    "as_policy",
    "as_reference",
    "as_reward",
    "bare",
    "check_base",
    "check_early",
    "content_hash",
    "dequantized",
    "dora_matrix",
    "find_adapter",
    "generating",
    "is_score_head",
    "load_adapter",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "pick_compute_dtype",
    "pick_device",
    "put_reward",
    "read_adapter",
    "read_header",
    "read_record",
    "record_notes",
    "record_of",
    "save_adapter",
    "save_for_resuming",
    "score_weight",
    "sync_reference",
    "template_hash",
    "weight_files",
    "without_dropout",
    "write_adapter",
    "write_record",
]
