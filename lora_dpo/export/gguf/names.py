"""The names that tensors get in GGUF files, by the tables of the `gguf` package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lora_dpo.export.gguf.adapter import A_ENDINGS, module_of
from lora_dpo.export.gguf.file import package

ENDINGS = (".weight", ".bias")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Place:
    """Where a source tensor is in the file.

    expert: its number, where all experts are one tensor. part: the name without layer and ending.
    transposed: the first factor of embeddings. may_turn: whether its rows are a weight's outputs.
    """

    name: str
    part: str
    expert: int | None = None
    transposed: bool = False
    may_turn: bool = True


def known_names(architecture: str, layers: int) -> Any | None:
    """The package's table for an architecture; None where it has none."""
    tables = package()
    for kind, name in tables.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return tables.get_tensor_name_map(kind, layers)
    return None


def place_of(name: str, names: Any) -> Place | None:
    """Where a tensor of a model, or a factor of an adapter, should be; None where no name is known for it."""
    module = module_of(name)
    if module is not None:
        return _factor(name, module, names)
    found = names.get_name(name, try_suffixes=ENDINGS)
    if found is not None:
        return Place(found, _part(found))
    expert = _EXPERT.match(name)
    if expert is None:
        return None
    whole = f"{expert[1]}.{expert[3]}"
    other = re.sub(r"^model\.layers\.(\d+)\.block_sparse_moe", r"layers.\1.feed_forward", whole)
    for spelling in (whole, other):
        found = names.get_name(spelling, try_suffixes=ENDINGS)
        if found is not None:
            return Place(found, _part(found), int(expert[2]))
    return None


def _factor(name: str, module: str, names: Any) -> Place | None:
    weight = names.get_name(f"{module}.weight", try_suffixes=ENDINGS)
    if weight is None:
        return None
    is_a = name.endswith(A_ENDINGS)
    ending = ".lora_a" if is_a else ".lora_b"
    return Place(weight + ending, _part(weight), transposed=is_a and "_embedding_" in name, may_turn=not is_a)


def _part(name: str) -> str:
    """blk.3.attn_q.weight → attn_q"""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight").removesuffix(".bias")
