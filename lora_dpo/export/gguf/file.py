"""A GGUF file's keys and tensors, through the `gguf` package, read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_dpo.errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def package() -> Any:
    """The `gguf` package, an extra: of no type, so that what is here is checked without it too."""
    import gguf

    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. shape: as torch has it, rows first. dtype: F32, F16 or BF16; others can't be read here.
    data: mapped, not read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: Any

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def rows(self, expert: int | None) -> int:
        """How many rows it has, or one of its experts."""
        shape = self.shape if expert is None else self.shape[1:]
        return shape[0] if shape else 1

    def blocks(self, expert: int | None, values: int) -> Iterator[tuple[int, int]]:
        """(start, end) of blocks of rows that have about so many values."""
        rows = self.rows(expert)
        size = prod(self.shape if expert is None else self.shape[1:])
        step = max(1, values // max(1, size // max(1, rows)))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def read(self, expert: int | None = None, start: int | None = None, end: int | None = None) -> Tensor:
        """It, or one expert's, or rows of that, in the dtype it is stored in."""
        part = self.data if expert is None else self.data[expert]
        part = np.array(part if start is None else part[start:end])  # a copy: the file is mapped for reading
        if self.dtype == "BF16":
            return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(part)


@dataclass(frozen=True)
class GgufFile:
    """The keys of a file and its tensors by their names."""

    reader: Any
    tensors: dict[str, GgufTensor]

    @staticmethod
    def open(file: Path) -> GgufFile:
        """Raises ModelError for what is no whole GGUF file."""
        try:
            reader = package().GGUFReader(file)
            tensors = {}
            for tensor in reader.tensors:
                kind = tensor.tensor_type.name
                shape = tuple(int(n) for n in reversed(tensor.shape))
                tensors[tensor.name] = GgufTensor(tensor.name, shape, kind, tensor.data)
        except Exception as error:  # the package checks little: a short file makes numpy raise what it likes
            raise ModelError(
                "the converter ended well, but what it wrote is no GGUF file, or only a part of one"
            ) from error
        return GgufFile(reader, tensors)

    def get(self, key: str) -> Any:
        """A key's value; None where it isn't there."""
        found = self.reader.get_field(key)
        return None if found is None else found.contents()

    def own(self, key: str) -> Any:
        """The value of an architecture's own key, such as context_length; None where it isn't there."""
        return self.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> int | None:
        """An architecture's own key where it is one whole number, the same for all layers."""
        value = self.own(key)
        return value if isinstance(value, int) else None

    @cached_property
    def architecture(self) -> str:
        return str(self.get("general.architecture"))

    @cached_property
    def layers(self) -> int | None:
        return self.number("block_count")
