"""What decides the rewards of a model: its base, and the adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft import LoraConfig, PeftModel

from lora_dpo.errors import ModelError
from lora_dpo.judging.judges import fingerprint
from lora_dpo.model import Model, adapter_tensors, content_hash, find_adapter
from lora_dpo.model.stored import hash_of
from lora_dpo.reference import adapter_fingerprint, base_fingerprint


def model_fingerprint(model: Model, say: Callable[[str], None] = lambda line: None) -> str:
    """Base, policy and reference of a model: 16 hexadecimal digits."""
    adapters = [_adapters(model, names) for names in (model.policy_adapters, model.reference_adapters)]
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


def adapter_content(folder: str) -> str:
    """A saved adapter: a hash of its tensors, and its config as it is written. Raises ModelError."""
    place = find_adapter(folder, "judge.of")
    config = (place / "adapter_config.json").read_text(encoding="utf-8")
    return fingerprint(hash_of([place / "adapter_model.safetensors"]), config)


def _adapters(model: Model, names: Sequence[str]) -> list[str]:
    network = model.network
    if not isinstance(network, PeftModel):
        return []
    usual, found = LoraConfig().to_dict(), []
    for name in names:
        config = network.peft_config[name].to_dict()
        told = {key: value for key, value in config.items() if value != usual.get(key)}
        found.append(adapter_fingerprint(adapter_tensors(network, name), told))
    return found
