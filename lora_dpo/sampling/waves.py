"""Which prompts are answered together: as many as fit the memory, of like lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_dpo.model import Model
from lora_dpo.recipe import Sampling
from lora_dpo.ways import switching_lengths

ROWS = {"cpu": 64, "cuda": 256}
"""At most so many responses at a time: by then a pass over the weights is shared by enough of them, and the
logits of so many rows are still small beside the model."""

CPU_BYTES = 2 * 2**30
CUDA_SHARE = 0.5
"""Of a card's memory that the model leaves: the rest is for reading prompts, and for logits."""


@dataclass(frozen=True)
class Wave:
    """prompts: places in the list, of rising lengths."""

    prompts: tuple[int, ...]


def waves(lengths: Sequence[int], settings: Sampling, budget: int, rows: int, *, alike: bool) -> list[Wave]:
    """The prompts in waves, the longest first, so that memory that is too little shows at once.

    A function of the lengths and of what was set alone: whoever goes on with half of the work forms the same
    waves. lengths: tokens of each prompt. budget: tokens in the cache; a wave has one prompt at least. alike:
    a wave's prompts must have one length.
    """
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    groups = [list(same) for _, same in itertools.groupby(order, key=lambda n: lengths[n] if alike else 0)]
    return [Wave(tuple(w)) for group in groups for w in _filled(group, lengths, settings, budget, rows)]


def _filled(
    order: Sequence[int], lengths: Sequence[int], settings: Sampling, budget: int, rows: int
) -> list[list[int]]:
    found: list[list[int]] = []
    for n in order:
        first = found[-1][0] if found else n
        count = len(found[-1]) + 1 if found else 1
        cost = count * settings.responses * (lengths[first] + settings.max_new_tokens)
        if not found or cost > budget or count * settings.responses > rows:
            found.append([])
        found[-1].append(n)
    return found


def tokens_in_cache(model: Model) -> int:
    """How many tokens' keys and values may be kept where the recipe doesn't say.

    By the device's whole memory and the model's size, not by what happens to be free: the same another time.
    """
    config = model.causal.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1024) // max(heads, 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = 2 * getattr(config, "num_hidden_layers", 32) * groups * width * 2  # keys and values, 16 bits
    if model.device.type != "cuda":
        return max(1, CPU_BYTES // size)
    whole = torch.cuda.get_device_properties(model.device).total_memory
    left = whole - sum(p.nbytes for p in model.causal.parameters())
    return max(1, int(left * CUDA_SHARE) // size)


def rows_at_once(model: Model) -> int:
    return ROWS.get(model.device.type, ROWS["cuda"])


def must_be_alike(model: Model) -> bool:
    """Whether only prompts of one length may be answered together: recurrent layers read padding, some rotary
    frequencies go by the longest of a batch, and chunks of attention by the place in it.
    """
    config = model.causal.config
    chunks = getattr(config.get_text_config(), "attention_chunk_size", None) is not None
    return model.way in ("padded", "single") or chunks or bool(switching_lengths(config))
