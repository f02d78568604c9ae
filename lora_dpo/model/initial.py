"""Adapters that start from the base's own directions, and still are exactly nothing in the beginning.

Legend: `I` inputs, `O` outputs, `r` rank, `s` the adapter's scaling.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) take such a start
B₀ A₀ out of the base's weight, which then is no longer the reference, and in 4 bits is rounded anew. Here the
base stays: a frozen adapter holds B₀ and A₀ and is subtracted (see `low_rank`). What is exported is one
adapter of twice the rank.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from lora_dpo.errors import ModelError
from lora_dpo.model.low_rank import INITIAL, PLAIN, factors_of_difference
from lora_dpo.model.weights import base_matrix

EXACT = 1024
"""Up to this width singular vectors are computed in full; above by subspace iterations, as PiSSA's authors
recommend."""


def start_from_base(network: PeftModel, init: str, name: str = "default") -> None:
    """Set an adapter's factors to a start of the kind, and add a frozen copy that is to be subtracted.

    Raises ModelError where the rank is larger than a layer.
    """
    layers = {path: layer for path, layer in network.named_modules() if type(layer) in PLAIN}
    for path, layer in layers.items():
        _check_rank(path, layer, name)
        b, a = starting_factors(base_matrix(layer), layer.r[name], init, layer.scaling[name])
        layer.lora_B[name].weight.data = b
        layer.lora_A[name].weight.data = a
    trainable = {n for n, p in network.named_parameters() if p.requires_grad}
    network.add_adapter(INITIAL, _negated(network.peft_config[name]))
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter_name in trainable)
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[INITIAL].weight.data = factors[name].weight.detach().clone()


def _check_rank(path: str, layer: Any, name: str) -> None:
    most = min(layer.in_features, layer.out_features)
    if layer.r[name] > most:
        where = path.removeprefix("base_model.model.")
        raise ModelError(
            f"adapter.rank {layer.r[name]} is more than {where} has directions ({most}); lower it, or set"
            " adapter.init=default"
        )


def _negated(config: Any) -> LoraConfig:
    """The config of the copy: the same factors, subtracted."""
    frozen = copy.deepcopy(config)
    frozen.lora_alpha = -config.lora_alpha
    frozen.alpha_pattern = {key: -value for key, value in config.alpha_pattern.items()}
    frozen.lora_dropout = 0.0
    frozen.modules_to_save = frozen.trainable_token_indices = None
    frozen.inference_mode = True
    return frozen


def starting_factors(weight: Tensor, rank: int, init: str, scaling: float) -> tuple[Tensor, Tensor]:
    """(B₀ [O, r], A₀ [r, I]) from W [O, I].

    "pissa" (eq. 2 and 3): W = U S Vᵀ, B₀ = U_r √(S_r / s), A₀ = √(S_r / s) V_rᵀ, so that s · B₀ A₀ is W's
    best approximation of rank r. "olora" (eq. 3): W = Q R, B₀ = Q_r, A₀ = R_r.
    """
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return q[:, :rank].contiguous(), upper[:rank].contiguous()
    u, values, vt = principal(weight, rank, iterations=16)
    root = (values / scaling).sqrt()
    return (u * root).contiguous(), (root[:, None] * vt).contiguous()


def principal(matrix: Tensor, count: int, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [k], and their vectors: ([M, k], [k], [k, N]) of a matrix [M, N].

    Where both sides are above `EXACT`, by so many subspace iterations (Halko et al. 2011, arXiv:0909.4061).
    """
    if min(matrix.shape) <= EXACT:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, values, v = torch.svd_lowrank(matrix, q=min(count + 8, *matrix.shape), niter=iterations)
        vt = v.T
    return u[:, :count], values[:count], vt[:count]


def start_tensors(network: PeftModel) -> dict[str, Tensor]:
    """B₀ and A₀ of every layer, by the names that B and A have in PEFT's files; not copies."""
    return {
        f"{path}.{factor}.weight": getattr(layer, factor)[INITIAL].weight.detach()
        for path, layer in network.named_modules()
        if type(layer) in PLAIN and INITIAL in layer.lora_A
        for factor in ("lora_A", "lora_B")
    }


def save_doubled(network: PeftModel, folder: Path, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Write the adapter less its start as one of twice the rank, which any PEFT loads.

    adapter: PEFT's name of it. tensors: its own, by their names in PEFT's files.
    """
    start = start_tensors(network)
    doubled = dict(tensors)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = name.replace(".lora_A.", ".lora_B.")
            doubled[name], doubled[up] = factors_of_difference(a, start[name], tensors[up], start[up])
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in doubled.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = copy.deepcopy(network.peft_config[adapter])
    # s = alpha / r, or alpha / √r, is to stay what it was.
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.rank_pattern = 2 * config.r, {key: 2 * r for key, r in config.rank_pattern.items()}
    config.lora_alpha *= factor
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.inference_mode = True
    config.save_pretrained(str(folder))
