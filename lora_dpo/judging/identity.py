"""What decides the rewards of a model: its base, and the adapters on it."""

from __future__ import annotations

from collections.abc import Callable

from lora_dpo.errors import ModelError
from lora_dpo.judging.judges import fingerprint
from lora_dpo.model import Model, content_hash
from lora_dpo.reference import base_fingerprint, fingerprint_in_memory


def model_fingerprint(model: Model, say: Callable[[str], None] = lambda line: None) -> str:
    """Base, policy and reference of a model: 16 hexadecimal digits."""
    roles = (model.policy_adapters, model.reference_adapters)
    adapters = [[fingerprint_in_memory(model, name) for name in names] for names in roles]
    return fingerprint(base_content(model, say), adapters)


def base_content(model: Model, say: Callable[[str], None] = lambda line: None) -> str:
    """The base, and how it is computed: by its files, whose hash is remembered; else as it lies in memory."""
    computed = str(model.compute_dtype)
    if model.base is not None:
        try:
            content = content_hash(model.base, say=say)
            return f"{content} {model.base.quantization} {model.base.double_quantization} {computed}"
        except ModelError:  # its files are not there any more
            pass
    return f"{base_fingerprint(model)} {computed}"
