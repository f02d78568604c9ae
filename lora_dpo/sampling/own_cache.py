"""Decoding by the model's own attention and its own cache: right for whatever transformers can generate with.

Legend: `B` prompts, `N` rows, `L` the longest prompt, `V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lora_dpo.model import Model

CACHES = ("past_key_values", "cache_params")
"""The names under which models take and give their cache."""


def has_own_cache(model: Model) -> bool:
    """Whether the model takes a cache whose rows can be repeated and left out.

    Some keep a part of it in their layers (RecurrentGemma), and of those whose sequences have to be run one
    at a time it is not known whether it is right (Doge's isn't).
    """
    inside = any(hasattr(module, "_setup_cache") for module in model.causal.modules())
    return model.way != "single" and not inside and any(name in _parameters(model) for name in CACHES)


def _parameters(model: Model) -> Any:
    return inspect.signature(model.causal.forward).parameters


class OwnCache:
    """Prompts of several lengths are padded on the left and masked; those of one length are not."""

    def __init__(self, model: Model):
        self._causal: PreTrainedModel = model.causal
        names = _parameters(model)
        self._cache_name = next((name for name in CACHES if name in names), CACHES[0])
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._takes_positions = "position_ids" in names

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest, device = max(map(len, prompts)), self._causal.device
        self._cache: Any = DynamicCache(config=self._causal.config)
        self._length = 0
        self._mask: Tensor | None = None
        if any(len(prompt) < longest for prompt in prompts):
            # What stands in padded places is masked; any id does.
            rows = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            self._mask = torch.tensor(rows, device=device)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        return self._forward(ids)

    def repeat(self, copies: int) -> None:
        self._select(torch.arange(self._rows, device=self._causal.device).repeat_interleave(copies))

    def write(self, tokens: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self._select(rows)

    def _select(self, rows: Tensor) -> None:
        # By the name for beam search: unlike the others, every kind of layer has it.
        self._cache.reorder_cache(rows)
        if self._mask is not None:
            self._mask = self._mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        self._rows, new = ids.shape
        more: dict[str, Any] = {self._cache_name: self._cache}
        if self._mask is not None:
            more["attention_mask"] = self._mask
        if self._takes_positions:
            # Always told: some models count from 0 at every call.
            more["position_ids"] = self._positions(new, ids.device)
        self._length += new
        output = self._causal(input_ids=ids, use_cache=True, **more, **self._last_only)
        return output.logits[:, -1]

    def _positions(self, new: int, device: torch.device) -> Tensor:
        if self._mask is None:
            return torch.arange(self._length, self._length + new, device=device).expand(self._rows, new)
        return (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]


class Again:
    """Without a cache: everything is read again for every token. Slow, and right where a cache isn't.

    For rows of one length only.
    """

    def __init__(self, model: Model):
        self._causal: PreTrainedModel = model.causal

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._ids = torch.tensor([list(prompt) for prompt in prompts], device=self._causal.device)
        return self._forward()

    def repeat(self, copies: int) -> None:
        self._ids = self._ids.repeat_interleave(copies, dim=0)

    def write(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        return self._forward()

    def keep(self, rows: Tensor) -> None:
        self._ids = self._ids[rows]

    def _forward(self) -> Tensor:
        return self._causal(input_ids=self._ids, use_cache=False).logits[:, -1]
