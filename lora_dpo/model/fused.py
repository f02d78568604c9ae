"""Liger's fused kernels (Hsu et al. 2024, arXiv:2410.10989) in place of the model's own layers: optional."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from lora_dpo.errors import ModelError

FUSED = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
"""What is fused. The losses and the head stay ours: they never make the full logits."""

OWN = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_fused_kernels(device: torch.device) -> None:
    """Raise ModelError where Liger's kernels can't run: they are Triton's, for CUDA."""
    if device.type != "cuda":
        raise ModelError("base.fused_kernels=true needs a CUDA device; leave it out on the CPU")
    if find_spec("liger_kernel") is None:
        raise ModelError('base.fused_kernels=true needs Liger: pip install "lora-dpo[liger]"')


def fuse_kernels(network: PreTrainedModel) -> None:
    """Fuse RMSNorm, SwiGLU and RoPE; an architecture that Liger doesn't know stays as it is.

    Liger also rebinds names in the architecture's module, where every model of its kind would meet them:
    classes are put back, and functions (RoPE) keep the plain one for tensors that are not on a card.
    """
    module = sys.modules[type(network).__module__]
    before = dict(vars(module))
    apply_liger_kernel(network, FUSED | OWN)
    for name, plain in before.items():
        fused = vars(module).get(name)
        if fused is not plain:
            setattr(module, name, plain if isinstance(plain, type) else _on_cuda(fused, plain))


def _on_cuda(fused: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return (fused if first.is_cuda else plain)(first, *rest, **options)

    return call
