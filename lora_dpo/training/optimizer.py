"""The optimizer, its schedule, and its state as plain tensors (no pickles)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.recipe import Training


def make_optimizer(training: Training, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): torch's, or bitsandbytes' 8-bit and paged ones."""
    arguments: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    tensors = list(parameters.values())
    if training.optimizer == "adamw":
        return torch.optim.AdamW(tensors, fused=tensors[0].is_cuda, **arguments)
    import bitsandbytes as bnb

    if not tensors[0].is_cuda:
        # What pages on a card is ordinary memory here: nothing to warn about.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return kinds[training.optimizer](tensors, **arguments)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of the 0-based step of so many: rises linearly over the warm-up, then falls to 0 or stays."""
    warm = math.ceil(training.warmup * steps)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return training.learning_rate * shape[training.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """(tensors, numbers), both named "parameter name::what"."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int | float] = {}
    for name, parameter in parameters.items():
        for what, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{name}::{what}"] = value.detach().cpu().clone().contiguous()
            elif isinstance(value, (int, float)):
                numbers[f"{name}::{what}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float],
) -> None:
    """Put back what `optimizer_state` gave."""
    for index, (name, parameter) in enumerate(parameters.items()):
        own = {key.partition("::")[2]: value for key, value in tensors.items() if key.startswith(name + "::")}
        own |= {key.partition("::")[2]: n for key, n in numbers.items() if key.startswith(name + "::")}
        if not own:
            continue
        if hasattr(optimizer, "init_state"):
            # bitsandbytes makes its own buffers (paged ones live in memory of their own): fill those.
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)  # pyright: ignore
        state = optimizer.state[parameter]
        for what, value in own.items():
            if isinstance(value, Tensor) and isinstance(state.get(what), Tensor):
                state[what].copy_(value)
            elif isinstance(value, Tensor):
                # torch's step counter stays on the CPU unless the optimizer is fused.
                on_device = what != "step" or bool(optimizer.param_groups[0].get("fused"))
                state[what] = value.to(parameter.device) if on_device else value.clone()
            else:
                state[what] = value
