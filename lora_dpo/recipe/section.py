"""What the parts of a recipe share: bounds, and fields that are checked when a part is made."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from lora_dpo.bounds import AtLeast
from lora_dpo.recipe.coerce import coerce, hints_of

Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
Positive = Annotated[float, AtLeast(0, exclusive=True)]
NotNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, AtLeast(0, high=1)]


class Section:
    """A part of the recipe whose fields are parsed and checked by their types when it is made."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            key = f"{self.section}.{item.name}".lstrip(".")
            object.__setattr__(self, item.name, coerce(hints[item.name], getattr(self, item.name), key))
