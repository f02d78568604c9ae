"""Branches as a few flat arrays and a JSON text, in safetensors' format: what the cache and workers exchange.

Legend: `N` records, `K` sides of all of them, `T` tokens with each shared prefix stored once, `V` names of
values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lora_dpo.preferences import Where
from lora_dpo.tokenization.branches import Branches

Arrays = Mapping[str, NDArray[Any]]


def to_bytes(branches: Sequence[Branches], facts: Mapping[str, Any]) -> bytes:
    """Branches, and `facts` that JSON can hold, as the bytes of a safetensors file with a hash of both."""
    files: dict[str, int] = {}
    names = sorted({name for item in branches for name in item.values})
    arrays = {
        "ids": _joined([ids for item in branches for ids in (item.prefix, *item.rests)], np.int32),
        "scored": _joined([mask for item in branches for mask in item.scored], np.bool_),
        "prefixes": np.array([len(item.prefix) for item in branches], dtype=np.int64),
        "rests": np.array([len(rest) for item in branches for rest in item.rests], dtype=np.int64),
        "sides": np.array([item.sides for item in branches], dtype=np.int64),
        "files": np.array([files.setdefault(b.where.file, len(files)) for b in branches], dtype=np.int64),
        "rows": np.array([item.where.row for item in branches], dtype=np.int64),
        # [N × V]; what a record doesn't have is told apart from every number.
        "values": np.array([b.values.get(n, 0.0) for b in branches for n in names], dtype=np.float64),
        "valued": np.array([n in b.values for b in branches for n in names], dtype=np.bool_),
    }
    text = json.dumps({"files": list(files), "names": names, "facts": dict(facts)})
    return save(arrays, metadata={"json": text, "sha256": _digest(arrays, text)})


def from_bytes(data: bytes) -> tuple[list[Branches], dict[str, Any]]:
    """What `to_bytes` was given. Raises ValueError if a byte of it has changed."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        arrays = load(data)
        text, expected = header["json"], header["sha256"]
    except (SafetensorError, KeyError, TypeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"not what was written: {error}") from error
    if _digest(arrays, text) != expected:
        raise ValueError("not what was written: the hash differs")
    known = json.loads(text)
    branches = _branches(arrays, known["files"], _values(arrays, known["names"]))
    return branches, known["facts"]


def _values(arrays: Arrays, names: list[str]) -> list[dict[str, float]]:
    """What each record has under which of the names."""
    shape = (len(arrays["rows"]), len(names))
    numbers, has = (arrays[name].reshape(shape).tolist() for name in ("values", "valued"))
    return [
        {name: number for name, number, is_there in zip(names, *row, strict=True) if is_there}
        for row in zip(numbers, has, strict=True)
    ]


def _branches(arrays: Arrays, files: list[str], values: list[dict[str, float]]) -> list[Branches]:
    """Views into arrays that can be written to, as those of `share` can."""
    ids, scored = arrays["ids"].copy(), arrays["scored"].copy()
    rests, rows = arrays["rests"].tolist(), arrays["rows"].tolist()
    places = [Where(files[n], row) for n, row in zip(arrays["files"].tolist(), rows, strict=True)]
    found: list[Branches] = []
    token = mask = side = 0
    shapes = zip(arrays["prefixes"].tolist(), arrays["sides"].tolist(), places, values, strict=True)
    for prefix, sides, where, numbers in shapes:
        lengths = rests[side : side + sides]
        ends = np.cumsum([token + prefix, *lengths]).tolist()
        marks = np.cumsum([mask, *(prefix + length for length in lengths)]).tolist()
        found.append(
            Branches(
                ids[token : token + prefix],
                tuple(ids[a:b] for a, b in pairwise(ends)),
                tuple(scored[a:b] for a, b in pairwise(marks)),
                where,
                numbers,
            )
        )
        token, mask, side = ends[-1], marks[-1], side + sides
    return found


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _digest(arrays: Arrays, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
