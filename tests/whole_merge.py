"""The whole merge at once, in memory, module by module: what the streaming merge is compared with.

Slower and plainer: base and adapter are loaded as they are trained, and each module is asked for its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ModelError
from lora_dpo.model import Model, dequantized, dora_matrix, load_config
from lora_dpo.recipe import Base

PEFTS_OWN = (LoraLayer, AuxiliaryTrainingWrapper)


def merged_network(model: Model, base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The model without quantization and adapter, its weights on the CPU in `dtype`."""
    config = load_config(base)
    config.dtype = dtype
    if config.get_text_config().tie_word_embeddings and not _still_tied(model):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        weights = dict(merged_tensors(model.causal, plain, dtype))
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, p in plain.named_parameters() if p.is_meta]
    if missing:
        raise ModelError(f"{missing[0]} is in the base's architecture but was not loaded: it can't be merged")
    plain.generation_config = model.causal.generation_config
    return plain


def _still_tied(model: Model) -> bool:
    """Whether head and embeddings, one weight in the base, are still one with the adapter merged."""
    embeddings, head = model.causal.get_input_embeddings(), model.head
    changed = [module for module in (embeddings, head) if isinstance(module, PEFTS_OWN)]
    return not changed or torch.equal(merged_weight(embeddings).float(), merged_weight(head).float())


def merged_tensors(source: nn.Module, plain: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter and saved buffer of the plain model, from the source's same-named
    module.
    """
    saved = set(plain.state_dict().keys())
    for path, module in plain.named_modules():
        names = [*module._parameters, *module._buffers]
        own = _module_at(source, path)
        for name in names:
            full = f"{path}.{name}".lstrip(".")
            if full not in saved:
                continue
            tensor = merged_parameter(own, name)
            if name == "weight" and tensor is not None and _is_transposed(module, own):
                tensor = tensor.T.contiguous()
            if tensor is not None:
                yield full, _rounded(tensor, dtype, full)


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of the plain model, also below one that an adapter was put around."""
    module: Any = root
    for part in path.split(".") if path else ():
        if isinstance(module, LoraLayer) and not hasattr(module, part):
            module = module.get_base_layer()
        module = getattr(module, part)
    return module


def _is_transposed(plain: nn.Module, source: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed; bitsandbytes puts an ordinary linear layer in its place."""
    return isinstance(plain, Conv1D) and not isinstance(_unwrapped(source), Conv1D)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().cpu()
    out = tensor.detach().to(device="cpu", dtype=dtype)
    if not bool(torch.isfinite(out).all()):
        raise ModelError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: export with --dtype bfloat16"
        )
    return out


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that acts in this place when adapters are on, without the products that are added to it."""
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    if isinstance(module, TrainableTokensWrapper):
        return module.original_module
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def merged_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter or buffer as it acts with the adapter on; a weight comes dequantized."""
    if name == "weight" and not isinstance(module, ParamWrapper):
        return merged_weight(module)
    tensor: Tensor | None = getattr(_unwrapped(module), name)
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name and tensor is not None:
            updates = [module.get_delta_weight(adapter) for adapter in module.active_adapters]
            tensor = tensor.float() + torch.stack(updates).sum(dim=0).float()
        module = module.base_layer
    return tensor


def merged_weight(module: nn.Module) -> Tensor:
    """A module's weight as it acts: dequantized, with the adapter's update (alpha / rank) B A added in
    float32, or with DoRA's magnitudes, or with the rows of trained tokens.
    """
    weight = dequantized(_unwrapped(module))
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
    if not isinstance(module, LoraLayer):
        return weight
    layer: Any = module
    names = [name for name in layer.active_adapters if name in layer._get_available_adapters()]
    if names and names[0] in layer.lora_variant:
        matrix = dora_matrix(layer, names[0])
        return matrix.T if getattr(layer, "fan_in_fan_out", False) else matrix
    for name in names:
        weight = weight.float() + layer.get_delta_weight(name).float()
    return weight
