"""DoRA's product: y = m ⊙ (W + s · B A) x / ‖W + s · B A‖ (Liu et al. 2024, arXiv:2402.09353, eq. 5).

Legend: `T` tokens, `I` inputs, `O` outputs, `r` rank. The norms ‖·‖ [O] are those of the rows of [O, I], one
for each output, and are constants to the gradient (section 4.3).

peft makes the whole matrix W + s · B A at each forward pass, in the compute dtype, and compares its norms
with a magnitude m that was taken in another dtype: in bfloat16 the untrained policy is then off its reference
by hundredths of a nat. Here the norms come from

    ‖w + s · b A‖² = ‖w‖² + 2 s · b (A w) + s² · b (A Aᵀ) bᵀ        for each row w of W and b of B

in float32. With B = 0 they are ‖w‖ exactly, so that m / ‖·‖ is exactly 1 and the output exactly W x.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor
from torch.nn.functional import linear

from lora_dpo.model.low_rank import PLAIN
from lora_dpo.model.weights import base_matrix

SMALLEST_NORM = 1e-12
"""A norm is at least this: a row of zeros has the direction of nothing."""


def decompose(layers: list[Any]) -> None:
    """Give each DoRA layer the forward of this module."""
    for layer, _ in _with_magnitudes(layers):
        layer.forward = _Forward(layer)


def start_magnitudes(layers: list[Any]) -> None:
    """The magnitudes of fresh adapters become the norms that the forward pass will take."""
    for layer, name in _with_magnitudes(layers):
        layer.lora_magnitude_vector[name].weight.data = layer.forward.squares.sqrt().clamp_min(SMALLEST_NORM)


def _with_magnitudes(layers: list[Any]) -> list[tuple[Any, str]]:
    """(layer, adapter's name) of every plain layer's DoRA adapters."""
    return [
        (layer, name)
        for layer in layers
        if type(layer) in PLAIN
        for name, variant in layer.lora_variant.items()
        if isinstance(variant, DoraLinearVariant)
    ]


class _Forward:
    """What a layer's `forward` becomes; peft's own where it was merged since, or has other adapters on."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.squares = base_matrix(layer).square().sum(dim=1)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        if layer._disable_adapters and not layer.merged:
            return layer.base_layer(x, *args, **kwargs)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.merged or kwargs or len(names) != 1 or names[0] not in layer.lora_variant:
            return type(layer).forward(layer, x, *args, **kwargs)
        name = names[0]
        result = layer.base_layer(x)
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        dropped = layer.lora_dropout[name](x)
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(a.dtype)
        low = linear(linear(dropped, a), b) * scaling
        ratio = layer.lora_magnitude_vector[name].weight / self._norms(a.detach(), b.detach(), scaling)
        bias = layer.get_base_layer().bias
        product = result if bias is None else result - bias
        return (result + (ratio - 1) * product + ratio * low).to(result.dtype)

    def _norms(self, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The norms of the rows of W + s · B A: [O]."""
        if self.squares.device != a.device:
            self.squares = self.squares.to(a.device)
        with torch.autocast(a.device.type, enabled=False):
            mixed = base_matrix(self.layer).to(a.dtype) @ a.t()
            squares = self.squares.to(a.dtype) + 2 * scaling * (b * mixed).sum(dim=1)
            squares = squares + scaling**2 * ((b @ (a @ a.t())) * b).sum(dim=1)
        return squares.clamp_min(0).sqrt().clamp_min(SMALLEST_NORM)


def dora_matrix(layer: Any, name: str) -> Tensor:
    """m ⊙ (W + s · B A) / ‖W + s · B A‖ [O, I] in float32: what the layer multiplies with."""
    a, b = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
    matrix = base_matrix(layer).float() + layer.scaling[name] * (b @ a)
    norms = matrix.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    return layer.lora_magnitude_vector[name].weight.detach().float()[:, None] * (matrix / norms)
