"""What the frozen reference says: computed, and kept on disk under the identity of what it depends on."""

from lora_dpo.reference.cache import ReferenceCache
from lora_dpo.reference.fresh import reference_logprobs
from lora_dpo.reference.identity import (
    BASE,
    adapter_fingerprint,
    adapters_fingerprint,
    base_fingerprint,
    reference_fingerprint,
    reference_identity,
)

__all__ = [
    "BASE",
    "ReferenceCache",
    "adapter_fingerprint",
    "adapters_fingerprint",
    "base_fingerprint",
    "reference_fingerprint",
    "reference_identity",
    "reference_logprobs",
]
