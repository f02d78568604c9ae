"""The weights of a base as they lie on disk: which files, which tensors, and one hash of them all.

A safetensors file is the length of its header (8 bytes), the header (JSON: name → dtype, shape, and where the
bytes lie), then the tensors without a gap. Headers are read here, tensors in blocks: a hash of a large base
takes little memory of its own, and what the system keeps in its page cache is read from there. A base may be
a stranger's: nothing in a header is believed before it is checked against the file's size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import xxhash
from huggingface_hub import try_to_load_from_cache
from transformers.utils import SAFE_WEIGHTS_NAME

from lora_dpo.errors import ModelError
from lora_dpo.model.trust import INDEX, PLAIN_WEIGHTS, read_json
from lora_dpo.recipe import Base

LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""

MOST_DIMENSIONS = 64

BLOCK = 2**20
"""So many bytes are read at a time: they are still in the processor's cache when they are hashed."""

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
"""Bits of a value. Of a dtype that isn't here, the size is what the header says."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `size` bytes from `start` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def read_header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes. Raises ModelError naming the file."""
    try:
        total = file.stat().st_size
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if total < 8 or length > min(LARGEST_HEADER, total - 8):
                raise _broken(file, f"its header would have {length:,} bytes")
            header = json.loads(content.read(length).decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is no JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no object")
    first = 8 + length
    tensors = [_tensor(file, name, value, first) for name, value in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = first
    for tensor in tensors:
        if tensor.start != end:
            raise _broken(file, f"{tensor.name!r:.80} does not begin where the one before it ends")
        end += tensor.size
    if end != total:
        raise _broken(file, f"its tensors would end at byte {end:,}, and it has {total:,}")
    return tensors


def _tensor(file: Path, name: str, value: Any, first: int) -> Stored:
    what = f"its header's {name!r:.80}"
    if not isinstance(value, dict):
        raise _broken(file, f"{what} is no tensor")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _broken(file, f"{what} lacks dtype, shape or data_offsets")
    size = offsets[1] - offsets[0]
    if size < 0 or (dtype in BITS and size != math.prod(shape) * BITS[dtype] // 8):
        raise _broken(file, f"{what} has {size:,} bytes, which its dtype and shape do not give")
    return Stored(name, dtype, tuple(shape), file, first + offsets[0], size)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a short list of whole numbers that a file could hold."""
    short = isinstance(value, list) and len(value) <= MOST_DIMENSIONS
    return short and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _broken(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file} is no safetensors file, or a damaged one: {reason}")


def weight_files(base: Base) -> list[Path]:
    """The files that `load_base` reads, in the order of their names. Nothing is fetched.

    Raises ModelError where they are not there: of a hub id, those not in the local cache.
    """
    config = base_file(base, "config.json")
    named = read_json(config, "base.model").get("transformers_weights") if config else None
    names = [named] if isinstance(named, str) else [SAFE_WEIGHTS_NAME, INDEX]
    for name in names:
        found = base_file(base, name)
        if found is not None:
            return _shards(base, found) if name.endswith(".json") else [found]
    raise ModelError(f"base.model {base.model}: there is no {names[0]} in its folder, or in the local cache")


def _shards(base: Base, index: Path) -> list[Path]:
    names = read_json(index, "base.model").get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) and PLAIN_WEIGHTS.fullmatch(name) for name in names.values())
    ):
        raise ModelError(f"base.model: {index} names no .safetensors files beside it")
    found = {name: base_file(base, name) for name in sorted(set(names.values()))}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise ModelError(f"base.model {base.model}: {missing[0]}, which {index} names, is missing")
    return [file for file in found.values() if file is not None]


def base_file(base: Base, name: str) -> Path | None:
    """A file of the base, in its folder or in the hub's local cache; None where it isn't there."""
    try:
        folder = Path(base.model).expanduser()
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        found = try_to_load_from_cache(base.model, name, revision=base.revision)
    except (OSError, ValueError, RuntimeError) as error:  # no path, and no id either
        raise ModelError(f"base.model got {base.model!r:.80}: {error}") from error
    return Path(found) if isinstance(found, str) else None


def commit_of(base: Base) -> str | None:
    """The hub's commit of a base in its local cache, 40 hexadecimal digits; None for a folder's."""
    if Path(base.model).expanduser().is_dir():
        return None
    # In the cache a commit's files lie in a folder of its name.
    commit = weight_files(base)[0].parent.name
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def hash_of(files: list[Path]) -> str:
    """xxh3-128, 32 hexadecimal digits, of all tensors in the files: name, dtype, shape and bytes, by name.

    The order of the tensors in the files, and which file holds which, do not count. Raises ModelError.
    """
    digest = xxhash.xxh3_128()
    tensors = [tensor for file in files for tensor in read_header(file)]
    # A name that several files hold counts each time.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.name, tensor.file.name)):
        facts = [tensor.name, tensor.dtype, list(tensor.shape)]
        digest.update(json.dumps(facts).encode() + b"\0")
        for block in _blocks(tensor):
            digest.update(block)
    return digest.hexdigest()


def _blocks(tensor: Stored) -> Iterator[memoryview]:
    """A tensor's bytes; each block is gone when the next one is asked for."""
    space = memoryview(bytearray(min(BLOCK, tensor.size)))
    left = tensor.size
    try:
        with tensor.file.open("rb", buffering=0) as content:
            content.seek(tensor.start)
            while left:
                count = content.readinto(space[: min(left, BLOCK)])
                if not count:
                    raise _broken(tensor.file, f"it ends within {tensor.name!r:.80}")
                yield space[:count]
                left -= count
    except OSError as error:
        raise ModelError(f"{tensor.file} cannot be read: {error.strerror}") from error
