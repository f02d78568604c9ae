"""The optimizer, its schedule, and its state as plain tensors (no pickles)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.errors import RunError
from lora_dpo.out_of_memory import is_out_of_memory
from lora_dpo.recipe import Training

RATIO = "rate_ratio"
"""The key of a parameter group that holds its learning rate over the schedule's."""


def make_optimizer(
    training: Training, parameters: Mapping[str, nn.Parameter], *, lora_plus_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): torch's, or bitsandbytes' 8-bit and paged ones.

    lora_plus_ratio: how many times the learning rate of everything else LoRA's B has, at every step (LoRA+,
    Hayou et al. 2024, arXiv:2402.12354: η_B = λ η_A).
    """
    arguments: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    groups = _groups(parameters, lora_plus_ratio)
    cuda = next(iter(parameters.values())).is_cuda
    if training.optimizer == "adamw":
        return set_learning_rate(torch.optim.AdamW(groups, fused=cuda, **arguments), training.learning_rate)
    import bitsandbytes as bnb

    if not cuda:
        # What pages on a card is ordinary memory here: nothing to warn about.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return set_learning_rate(kinds[training.optimizer](groups, **arguments), training.learning_rate)


def _groups(parameters: Mapping[str, nn.Parameter], ratio: float) -> list[dict[str, Any]]:
    """Parameter groups with the ratio of their learning rate to the schedule's."""
    if ratio == 1.0:
        return [{"params": list(parameters.values()), RATIO: 1.0}]
    ups = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
    others = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
    return [{"params": others, RATIO: 1.0}, {"params": ups, RATIO: ratio}]


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of the 0-based step of so many: rises linearly over the warm-up, then falls to 0 or stays."""
    warm = math.ceil(training.warmup * steps)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return training.learning_rate * shape[training.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
    """Give every parameter group its share of the rate; returns the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)
    return optimizer


def allocate(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every parameter its moments now, as zeros: by itself the optimizer would at its first update, and
    memory that runs out in the middle of one leaves half of the adapter updated. Changes no update.
    """
    places = _places(optimizer)
    for parameter in parameters.values():
        if optimizer.state[parameter]:
            continue
        group, index = places[id(parameter)]
        if hasattr(optimizer, "init_state"):  # bitsandbytes
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)  # pyright: ignore
            continue
        fused = bool(optimizer.param_groups[group].get("fused"))
        # torch's step counter stays on the CPU unless the optimizer is fused.
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter] |= {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


@contextmanager
def whole_update() -> Iterator[None]:
    """Around an update: where memory runs out within it, a part is done, and it can't be tried again. Raises
    RunError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "memory ran out while the optimizer updated the adapter, of which a part may be updated: nothing"
            " of it is saved. --resume goes on from the last checkpoint; lower"
            " training.tokens_per_microbatch, or begin again with training.optimizer=paged_adamw_8bit"
        ) from error


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
    places = _places(optimizer)
    found: dict[str, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        name, _, what = key.partition("::")
        found.setdefault(name, {})[what] = value
    for name, parameter in parameters.items():
        own = found.get(name)
        if not own:
            continue
        if hasattr(optimizer, "init_state"):
            # bitsandbytes makes its own buffers (paged ones live in memory of their own): fill those.
            group, index = places[id(parameter)]
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)  # pyright: ignore
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


def _places(optimizer: torch.optim.Optimizer) -> dict[int, tuple[int, int]]:
    """Where each parameter is, by its id: (number of its group, number in the group)."""
    return {
        id(parameter): (n, m)
        for n, group in enumerate(optimizer.param_groups)
        for m, parameter in enumerate(group["params"])
    }
