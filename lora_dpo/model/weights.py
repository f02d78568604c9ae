"""Weights out of their storage. Legend: `I` inputs, `O` outputs of a linear layer."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as quantized
import torch
from torch import Tensor, nn


def dequantized(module: nn.Module) -> Tensor:
    """A module's weight, out of bitsandbytes' storage where it is in it."""
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    if isinstance(module, bnb.nn.Linear4bit):
        return quantized.dequantize_4bit(weight.data, weight.quant_state)  # pyright: ignore
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB  # pyright: ignore
        return quantized.int8_vectorwise_dequant(weight.data, scales)  # pyright: ignore[reportArgumentType]
    return weight


def base_matrix(layer: Any) -> Tensor:
    """What a LoRA layer's base multiplies with, y = W x: [O, I], float32 (float64 for a float64 model)."""
    weight = dequantized(layer.get_base_layer()).detach()
    weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
