"""LoRA's low-rank product, added in place: y = W x + s · B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Legend: `T` tokens, `I` inputs, `O` outputs, `r` rank.

peft clones W x, scales B A x and adds the two: four passes over [T, O] in the forward direction and one
more in the backward. Here one matrix product accumulates into W x. The result is also rounded once instead
of three times.

An adapter that doesn't start at zero has its start subtracted: y = W x + s · (B A − B₀ A₀) x, with a frozen
adapter named "initial" that holds B₀ and A₀. As a difference of two products that is neither exactly W x in
the beginning, nor does it notice small updates: rounded to bfloat16, B and B₀ are the same for hundreds of
steps. Written as

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀)

it is one product of twice the rank, [B − B₀, B₀] times [A; A − A₀], whose differences are taken in float32:
exactly zero in the beginning, in any dtype and on any device, and as exact afterwards as a product that
started from zero.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear, Linear4bit, Linear8bitLt
from torch import Tensor, nn

PLAIN = (Linear, Linear4bit, Linear8bitLt)
"""peft's layers whose adapter is a plain low-rank product, unless a variant says otherwise."""

INITIAL = "initial"
"""The name of the frozen adapter that holds another one's start, with its scaling negated."""


def add_in_place(layers: list[Any]) -> None:
    """Give each plain layer a forward that adds its low-rank product in place; the others keep peft's."""
    for layer in layers:
        if type(layer) in PLAIN and any(_is_plain(layer, name) for name in layer.lora_A):
            layer.forward = _Forward(layer)


def _is_plain(layer: Any, name: str) -> bool:
    """An adapter without DoRA or another variant, without bias, its factors trained in place."""
    return (
        name not in layer.lora_variant
        and not layer.lora_bias[name]
        and type(layer.lora_A[name]) is nn.Linear
        and type(layer.lora_B[name]) is nn.Linear
    )


class _Forward:
    """What a layer's `forward` becomes; peft's own where it was merged since, or has other adapters on."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        if layer._disable_adapters and not layer.merged:
            return layer.base_layer(x, *args, **kwargs)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.merged or kwargs or not names:
            return type(layer).forward(layer, x, *args, **kwargs)
        name = names[0]
        if not _is_plain(layer, name) or names[1:] not in ([], [INITIAL]):
            return type(layer).forward(layer, x, *args, **kwargs)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if names[1:]:
            a, b = factors_of_difference(a, layer.lora_A[INITIAL].weight, b, layer.lora_B[INITIAL].weight)
        dropped = layer.lora_dropout[name](x)
        return _AddLowRank.apply(layer.base_layer(x), dropped, a, b, layer.scaling[name])  # pyright: ignore


def factors_of_difference(a: Tensor, a0: Tensor, b: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """B A − B₀ A₀ as one product of twice the rank: ([A; A − A₀] [2r, I], [B − B₀, B₀] [O, 2r])."""
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


class _AddLowRank(torch.autograd.Function):
    """result + s · B A x, in place of result wherever that may be."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """result [..., O]; x [..., I]; a [r, I]; b [O, r]; products run in autocast's dtype, else in a's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        inner = rows @ a.to(dtype).t()
        up = (b * scaling).to(dtype).t()
        flat = result.view(-1, result.shape[-1])
        if result._is_view():
            # bitsandbytes hands out a view where there is a bias; autograd forbids to change that one.
            result = (torch.addmm(flat, inner, up) if flat.dtype == dtype else flat + inner @ up).view_as(
                result
            )
        else:
            _ = flat.addmm_(inner, up) if flat.dtype == dtype else flat.add_(inner @ up)
            ctx.mark_dirty(result)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        rows, inner, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
        by_inner = flat @ (b * ctx.scaling).to(rows.dtype)
        by_x = by_a = by_b = None
        if ctx.needs_input_grad[1]:
            by_x = (by_inner @ a.to(rows.dtype)).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            by_a = (by_inner.t() @ rows).to(a.dtype)
        if ctx.needs_input_grad[3]:
            by_b = (flat.t() @ inner).to(b.dtype).mul_(ctx.scaling)
        return grad, by_x, by_a, by_b, None
