"""The identity of a reference: a hash of everything its log-probs depend on but the example itself.

It is taken from what is really in memory, not from names: a folder or hub id whose weights were replaced is
another reference. Left out is what only moves rounding: the device, the versions of torch and CUDA, the
attention backend, and how examples are packed. So is what never reaches the reference: β, the learning rate,
and (while the reference is the base) the adapter's rank and seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_dpo.model import Model, adapter_tensors

BASE = "base"
"""The reference fingerprint of the base with its adapters off."""

ENGINE = 1
"""Raise it when the same model and example give other log-probs: what was kept before is then not found."""

CHUNK_BYTES = 64 * 2**20
"""So much of a tensor is copied from the device at a time."""

SAYS_NOTHING = {
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "transformers_version",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_internal",
}
"""Keys of a model's config that say where it came from or how it is called, not what it computes."""

ADAPTER_SAYS_NOTHING = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "task_type",
    "auto_mapping",
    "lora_dropout",
    "init_lora_weights",
    "runtime_config",
}
"""Keys of an adapter's config that do not act on what the finished adapter computes."""


def reference_identity(model: Model, reference: str = BASE, *, base: str | None = None) -> str:
    """The identity of a reference on this base: 32 hexadecimal digits.

    reference: `BASE`, or the fingerprint of the adapter that is on while the reference speaks. base: the
    base's, where it is known.
    """
    causal = model.causal
    facts = {
        "engine": ENGINE,
        "base": base or base_fingerprint(model),
        # Of a model with code of its own the module's name holds the commit of that code.
        "class": f"{type(causal).__module__}.{type(causal).__qualname__}",
        # Quantization as loaded, and what the model does to its logits, are in here too.
        "config": _without(causal.config.to_dict(), SAYS_NOTHING),
        "compute_dtype": str(model.compute_dtype),
        "reference": reference,
    }
    return xxhash.xxh3_128_hexdigest(_canonical(facts))


def reference_fingerprint(model: Model) -> str:
    """Who speaks as this model's reference now: `BASE`, or a hash of the adapters that are on then."""
    return adapters_fingerprint(model, model.reference_adapters)


def adapters_fingerprint(model: Model, names: Sequence[str]) -> str:
    """A hash of the adapters of these names, as they are now; `BASE` for none."""
    if not names or not isinstance(model.network, PeftModel):
        return BASE
    network = model.network
    usual = LoraConfig().to_dict()
    prints = []
    for name in names:
        config = network.peft_config[name].to_dict()
        # What is at its default is left out: a key that a later peft adds makes it no other adapter.
        told = {key: value for key, value in config.items() if value != usual.get(key)}
        prints.append(adapter_fingerprint(adapter_tensors(network, name), told))
    return prints[0] if len(prints) == 1 else xxhash.xxh3_128_hexdigest(_canonical(prints))


def base_fingerprint(model: Model) -> str:
    """A hash of the base as it lies in memory, 32 hexadecimal digits, whether an adapter is on it or not.

    Every parameter and buffer by name, shape, dtype and bytes, and the quantization's own state.
    """
    digest = xxhash.xxh3_128()
    first_name: dict[int, str] = {}
    for name, tensor, beside in _base_state(model.causal, ""):
        digest.update(name.encode() + b"\0")
        if id(tensor) in first_name:
            digest.update(_canonical({"tied to": first_name[id(tensor)]}))
            continue
        first_name[id(tensor)] = name
        _add_tensor(digest, tensor)
        for what, value in sorted(beside.items()):
            digest.update(what.encode() + b"\0")
            _add_tensor(digest, value) if isinstance(value, Tensor) else digest.update(_canonical(value))
    return digest.hexdigest()


def adapter_fingerprint(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """A hash of an adapter, 32 hexadecimal digits: its tensors, and what of its config computes something.

    Both as PEFT writes them: `adapter_model.safetensors` and `adapter_config.json`.
    """
    digest = xxhash.xxh3_128()
    told = _without(config, ADAPTER_SAYS_NOTHING)
    # PEFT writes sets as lists, in any order.
    sets = {"target_modules", "exclude_modules", "modules_to_save", "target_parameters"}
    told |= {k: sorted(told[k]) for k in sets & told.keys() if isinstance(told[k], (list, tuple, set))}
    digest.update(_canonical(told))
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        _add_tensor(digest, tensors[name])
    return digest.hexdigest()


def _base_state(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter or buffer, what quantization keeps beside it) of the base alone, without what peft put
    around and into its modules.

    An adapter is told by where it sits, not by requires_grad: a finished one is frozen too.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module  # pyright: ignore[reportAssignmentType]
    own = {k: v for k, v in (module._parameters | module._buffers).items() if v is not None}
    for name, tensor in own.items():
        yield prefix + name, tensor, _quantization(module, tensor)
    for name, child in module.named_children():
        yield from _base_state(child, f"{prefix}{name}.")


def _quantization(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """What bitsandbytes keeps beside a quantized weight: 4-bit scales, codebooks, offsets; int8's scales."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state.as_dict()
    # The first forward moves int8's scales from the weight to the module.
    if not hasattr(weight, "SCB"):
        return {}
    scales = getattr(weight, "SCB", None)
    return {"SCB": module.state.SCB if scales is None else scales}  # pyright: ignore


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(_canonical({"shape": list(tensor.shape), "dtype": str(tensor.dtype)}))
    flat = tensor.detach().reshape(-1)
    for part in flat.split(max(1, CHUNK_BYTES // tensor.element_size())):
        digest.update(part.contiguous().cpu().view(torch.uint8).numpy())


def _without(value: Any, keys: set[str]) -> Any:
    """Mappings, however deep, without these keys."""
    if isinstance(value, Mapping):
        return {str(k): _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\0"
