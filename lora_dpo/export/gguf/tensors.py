"""What safetensors files hold, from their headers, and single tensors or rows of them.

Nothing is read whole: files are as large as models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_dpo.errors import ModelError


@dataclass(frozen=True)
class Stored:
    """One tensor on disk. shape: as torch has it."""

    file: Path
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    def read(self, start: int | None = None, end: int | None = None) -> Tensor:
        """The tensor, or its rows from `start` to before `end`, in the dtype it has on disk."""
        with safe_open(self.file, "pt") as opened:
            part: Any = opened.get_slice(self.name)
            return part[start:end] if start is not None else opened.get_tensor(self.name)


def headers(folder: Path, pattern: str = "*.safetensors") -> dict[str, Stored]:
    """Every tensor in a folder's safetensors files, by its name. Raises ModelError for what is none."""
    found: dict[str, Stored] = {}
    files = sorted(folder.glob(pattern))
    if not files:
        raise ModelError(f"there is no {pattern} in {folder}")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    found[name] = Stored(file, name, tuple(opened.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    return found
