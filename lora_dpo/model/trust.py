"""What a base's files may not bring about: code that runs, files elsewhere, sizes that no weights fill.

A model's folder is somebody else's. Weights are safetensors, which hold numbers only; whatever else its JSON
asks for (pickled weights, an adapter's own base, attention kernels off the hub, shards outside the folder) is
refused, or left unheeded where the model is the same without it. Links are followed: in the hub's cache every
file is one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lora_dpo.errors import ModelError
from lora_dpo.probe.small import DEPTHS, EXPERT_COUNTS, HEAD_WIDTHS, HEADS, WIDTHS

INDEX = "model.safetensors.index.json"
LARGEST_JSON = 64 * 2**20
"""Bytes; the index of the largest models on the hub has some 5 MB."""
PLAIN_WEIGHTS = re.compile(r"\w[\w.\-]*\.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def read_json(file: Path, key: str) -> dict[str, Any]:
    """An object out of somebody else's JSON file. Raises ModelError for what is none, or has no end."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ModelError(f"{key}: {file} has {file.stat().st_size:,} bytes, which no such file needs")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{key}: {file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{key}: {file} holds no object of keys and values")
    return values


def check_folder(folder: Path) -> None:
    """Raise ModelError where a base's local folder asks for what isn't done here."""
    config = folder / "config.json"
    if config.is_file():
        _check_config(read_json(config, "base.model"), config)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"base.model: {folder} holds an adapter: give the model under it as base.model, and this"
            " folder as adapter.start_from"
        )
    if (folder / ".metadata").exists():
        raise ModelError(f"base.model: {folder} holds a distributed checkpoint; save it as safetensors")
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        _check_index(folder / INDEX)


def check_weights(folder: Path) -> None:
    """Raise ModelError where a base's folder has no safetensors; pickled weights run code when opened."""
    if (folder / "model.safetensors").is_file() or (folder / INDEX).is_file():
        return
    pickled = [file.name for pattern in PICKLED for file in sorted(folder.glob(pattern))]
    if pickled:
        raise ModelError(
            f"base.model: {folder} holds {pickled[0]}, which is pickled and could run code: it is not opened."
            " Give a copy with model.safetensors (save_pretrained writes one)"
        )
    raise ModelError(f"base.model: there is no model.safetensors in {folder}")


def _check_config(values: dict[str, Any], file: Path) -> None:
    weights = values.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and PLAIN_WEIGHTS.fullmatch(weights)):
        raise ModelError(
            f"base.model: transformers_weights in {file} names {weights!r:.80}, no file beside it"
        )
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for part in parts:
        for name, value in part.items():
            most = _most(name)
            if most is not None and isinstance(value, (int, float)) and not abs(value) <= most:
                raise ModelError(
                    f"base.model: {name} in {file} is {value:g}; no model has more than {most:,}"
                )


def _most(name: str) -> int | None:
    """The largest a size may be; None for what is no size."""
    if name in DEPTHS:
        return 2**10
    if HEADS.match(name) or EXPERT_COUNTS.match(name):
        return 2**14
    if name.startswith("vocab_size") or WIDTHS.match(name) or HEAD_WIDTHS.match(name):
        return 2**24
    return None


def _check_index(file: Path) -> None:
    names = read_json(file, "base.model").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"base.model: {file} has no weight_map")
    for name in names.values():
        if not (isinstance(name, str) and PLAIN_WEIGHTS.fullmatch(name)):
            raise ModelError(f"base.model: {file} names {name!r:.80}; it takes .safetensors files beside it")


def without_hints(config: PreTrainedConfig) -> None:
    """Forget which attention and experts a config.json asks for, in place.

    A name such as "org/repo" would be downloaded and run; which is used is decided here.
    """
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for part in (config, *inner):
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if getattr(part, name, None) is not None:
                setattr(part, name, None)


def check_size(config: PreTrainedConfig, folder: Path, **options: Any) -> None:
    """Raise ModelError where the architecture has more parameters than the weights can hold, at 4 bits each.

    What isn't in the file would be made up at random, after memory was found for it.
    """
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **options)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    if count > 4 * stored + 10**7:
        raise ModelError(
            f"base.model: config.json in {folder} describes {count:,} parameters, but its weights have"
            f" {stored:,} bytes"
        )
