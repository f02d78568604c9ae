"""Modules that are trained in full: float32 copies that compute as their originals do."""

from __future__ import annotations

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call


def compute_as_originals(network: nn.Module) -> None:
    """Let the copies compute from parameters that are rounded to their original's dtypes.

    Autocast does so for linear layers; an embedding or a norm would hand on float32 to all that follows, and
    an untrained copy would differ from its original.
    """
    for wrapper in network.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and not isinstance(wrapper.original_module, nn.Linear):
            wrapper._forward_wrapped = _AsOriginal(wrapper)


class _AsOriginal:
    """The forward of a copy, its parameters rounded to the original's dtypes for the while."""

    def __init__(self, wrapper: Any):
        self.wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.wrapper.modules_to_save[self.wrapper.active_adapters[0]]
        original = dict(self.wrapper.original_module.named_parameters())
        rounded = {name: p.to(original[name].dtype) for name, p in own.named_parameters()}
        return functional_call(own, rounded, args, kwargs)
