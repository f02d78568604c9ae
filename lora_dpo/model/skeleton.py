"""A base without its weights: which parameters it has, in what dtype they are loaded, which are quantized.

Made on torch's meta device by transformers' and bitsandbytes' own rules, so that what handles the base's
files one tensor at a time agrees with what loads them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lora_dpo.model.base import (
    QUANTIZED,
    load_config,
    pick_compute_dtype,
    pick_device,
    quantization_config,
    stored_quantization,
)
from lora_dpo.recipe import Base


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A base on the meta device.

    network: unquantized, its parameters in the dtypes in which they are loaded. quantized: paths of the
    modules whose weight bitsandbytes quantizes. wide: parameters that the architecture keeps in float32.
    tied: parameters that are one with another, by the other's name. device, compute_dtype: what the base is
    quantized on, and computes in. stored: what the checkpoint says of its own quantization, None for one that
    is quantized as it loads. mapping: transformers' rules that make parameters of the checkpoint's tensors.
    """

    base: Base
    network: PreTrainedModel
    quantized: frozenset[str]
    wide: frozenset[str]
    tied: Mapping[str, str]
    device: torch.device
    compute_dtype: torch.dtype
    stored: Mapping[str, Any] | None
    mapping: list[WeightTransform]

    @cached_property
    def renamings(self) -> list[WeightRenaming]:
        return [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]

    @cached_property
    def converters(self) -> list[WeightConverter]:
        return [entry for entry in self.mapping if isinstance(entry, WeightConverter)]

    @cached_property
    def own(self) -> dict[str, Tensor]:
        """Every parameter and saved buffer by name, without values."""
        return self.network.state_dict()

    def parameter_of(self, name: str) -> tuple[str, str | None]:
        """(parameter or buffer, pattern of the converter that makes it) of a tensor in the base's files."""
        own = self.own
        prefix = self.network.base_model_prefix
        found, pattern = rename_source_key(name, self.renamings, self.converters, prefix, own)
        if found not in own and name in own:
            return name, None
        if found not in own:
            found, pattern = (
                rename_source_key(name, [], [], prefix, own) if pattern is None else (found, pattern)
            )
        return found, pattern

    def is_quantized(self, parameter: str) -> bool:
        module, _, name = parameter.rpartition(".")
        return name == "weight" and module in self.quantized

    def is_transposed(self, parameter: str) -> bool:
        """Whether its file holds [I, O]: GPT-2's Conv1D."""
        module, _, name = parameter.rpartition(".")
        return name == "weight" and isinstance(self.network.get_submodule(module), Conv1D)


def skeleton_of(base: Base) -> Skeleton:
    """A base without its weights. Raises ModelError where its config can't be had."""
    device = pick_device(base)
    dtype = pick_compute_dtype(base, device)
    options: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    network, shell = (_on_meta(base, dtype, options) for _ in range(2))
    wide = _keep_wide(network, dtype)
    stored = stored_quantization(base)
    quantized: frozenset[str] = frozenset()
    settings = quantization_config(base, dtype) if stored is None else _settings(stored)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=stored is not None)
        quantizer.preprocess_model(model=shell, device_map={"": "cpu"})
        quantized = frozenset(n for n, module in shell.named_modules() if isinstance(module, QUANTIZED))
    return Skeleton(
        base,
        network,
        quantized,
        wide,
        dict(getattr(network, "all_tied_weights_keys", None) or {}),
        device,
        dtype,
        stored,
        get_model_conversion_mapping(network),
    )


def _on_meta(base: Base, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    config = load_config(base)
    config.dtype = dtype
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return network


def _keep_wide(network: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Give what the architecture keeps in float32 beside 16 bits that dtype, as loading does; their names."""
    plan = network._get_dtype_plan(dtype if dtype.itemsize == 2 else torch.bfloat16)
    if not plan:
        return frozenset()
    pattern, _, _ = build_glob_alternation(list(plan))
    named = [*network.named_parameters(), *network.named_buffers()]
    wide = {name: tensor for name, tensor in named if re.search(pattern, name) and tensor.is_floating_point()}
    for tensor in wide.values():
        tensor.data = tensor.data.float()
    return frozenset(wide)


def _settings(stored: Mapping[str, Any]) -> BitsAndBytesConfig:
    own = ("quant_method", "_load_in_4bit", "_load_in_8bit")
    return BitsAndBytesConfig(**{key: value for key, value in stored.items() if key not in own})
