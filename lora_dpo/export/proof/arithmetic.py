"""In what arithmetic two models are compared, and where: so that the difference is what storing lost.

A forward pass in bfloat16 rounds about as much as DPO's updates are large. In float32 the merged model and
base + adapter compute the same products, and what differs is how the weights were stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_dpo.model import Model, dequantized, pick_device
from lora_dpo.recipe import Base

SPARE = 1.1
"""A model's weights and this much of them must fit: the rest is for a micro-batch."""

CPU_PRODUCTS = 1e14
"""Multiplications and additions that comparing on a CPU may cost: some minutes."""

FEWEST = 4
"""So many examples are compared on a CPU, however large the model."""


@dataclass(frozen=True)
class Plan:
    """Where and how to compare. arithmetic: a dtype's name. said: what a person should know of it."""

    device: str
    arithmetic: str
    examples: int
    said: str = ""


@dataclass(frozen=True)
class NoRoom:
    """Comparing is not possible. said: why, with the bytes needed and available."""

    said: str


def plan(folder: Path, base: Base, dtype: str, tokens: Sequence[int]) -> Plan | NoRoom:
    """How to compare a model in a folder, stored in `dtype`, with the base that it came from.

    tokens: of each example. In float32 if that fits, else in the dtype it is stored in; on the base's device,
    else on the CPU.
    """
    count, stored = parameters_in(folder)
    sizes = {"float32": 4 * count, dtype: stored}
    free = {kind: free_bytes(kind) for kind in dict.fromkeys((device_of(base).type, "cpu"))}
    for kind, room in free.items():
        for arithmetic, size in sizes.items():
            if SPARE * size <= room:
                return _with_examples(kind, arithmetic, count, tokens)
    needed = SPARE * min(sizes.values())
    there = " and ".join(f"{_gb(room)} free on {_where(kind)}" for kind, room in free.items())
    return NoRoom(f"reloading the model takes {_gb(needed)} of memory; there are {there}")


def device_of(base: Base) -> torch.device:
    """The base's device; the CPU where a card was asked for that isn't here: an export needs none."""
    return pick_device(base if torch.cuda.is_available() else replace(base, device="cpu"))


def _with_examples(kind: str, arithmetic: str, parameters: int, tokens: Sequence[int]) -> Plan:
    if kind != "cpu":
        return Plan(kind, arithmetic, len(tokens))
    # Three models speak, each with a multiplication and an addition for every parameter and token.
    affordable = int(CPU_PRODUCTS / (6 * max(1, parameters) * max(1.0, sum(tokens) / max(1, len(tokens)))))
    examples = min(len(tokens), max(FEWEST, affordable))
    if examples == len(tokens):
        return Plan(kind, arithmetic, examples)
    return Plan(kind, arithmetic, examples, f"on the CPU, and so on {examples} of {len(tokens)} examples")


def parameters_in(folder: Path) -> tuple[int, int]:
    """(how many parameters, their bytes) a folder's safetensors files hold, by their headers."""
    count = stored = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as part:
            header: dict[str, Any] = json.loads(part.read(int.from_bytes(part.read(8), "little")))
        header.pop("__metadata__", None)
        count += sum(math.prod(tensor["shape"]) for tensor in header.values())
        stored += sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header.values())
    return count, stored


def free_bytes(kind: str) -> int:
    """Free memory of a card, or what the system has available, in bytes."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**63 - 1  # a system that doesn't say: the attempt does


def in_float32(model: Model) -> Model:
    """The same function in float32 arithmetic; the model that was given must not be used any more.

    Quantized weights keep their bytes, and are dequantized in the compute dtype that they were trained in,
    as a merge does it; bitsandbytes itself would dequantize them in the input's. int8 layers round their
    inputs as well, and go on doing so.
    """
    for module in model.network.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.forward = _Dequantized(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and not _is_quantized(module, name) and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = buffer.float()
    return replace(model, compute_dtype=torch.float32)


def _is_quantized(module: nn.Module, name: str) -> bool:
    return name == "weight" and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


class _Dequantized:
    """The forward of a 4-bit layer: W x + b, W dequantized in the dtype of its quantization state."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, dequantized(self.layer).to(x.dtype), self.layer.bias)


def _where(kind: str) -> str:
    return "the CPU" if kind == "cpu" else "the card"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
