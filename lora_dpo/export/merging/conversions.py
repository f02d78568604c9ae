"""How tensors of a checkpoint become parameters: by name, or converted by transformers' own rules.

A checkpoint may hold each expert apart where the model has one parameter for all, or one matrix where the
model has three. A merge works on parameters and writes what the checkpoint had.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    revert_weight_conversion,
)

from lora_dpo.errors import ModelError
from lora_dpo.model.skeleton import Skeleton
from lora_dpo.model.stored import Stored


@dataclass(eq=False)
class Group:
    """Tensors of a checkpoint that are made into parameters together.

    names: of the tensors, each with the converter's pattern that it fits. parameters: that come of them.
    converter: None where one tensor is one parameter.
    """

    parameters: list[str]
    converter: WeightConverter | None = None
    names: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)

    @property
    def is_of_experts(self) -> bool:
        """Whether the parameter is [expert, …], and each tensor some rows of one expert's matrix."""
        operations = [] if self.converter is None else self.converter.operations
        stacked = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        rest = operations[1:]
        joined = not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)
        return stacked and joined and len(self.parameters) == 1

    def by_pattern(self) -> list[list[str]]:
        """Names by the converter's patterns in their order, experts in theirs."""
        assert self.converter is not None
        pairs = list(zip(self.names, self.patterns, strict=True))
        return [[n for n, own in pairs if own == pattern] for pattern in self.converter.source_patterns]

    def convert(self, tensors: Mapping[str, Tensor], skeleton: Skeleton) -> dict[str, Tensor]:
        """The parameters out of the tensors, as transformers makes them when it loads."""
        assert self.converter is not None
        converter = copy.deepcopy(self.converter)
        for name, pattern in zip(self.names, self.patterns, strict=True):
            future: Any = tensors[name]
            converter.add_tensor(self.parameters[0], name, str(pattern), future)
        made: dict[str, Any] = converter.convert(
            self.parameters[0], model=skeleton.network, config=skeleton.network.config
        )
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, parameters: Mapping[str, Tensor], skeleton: Skeleton) -> dict[str, Tensor]:
        """The tensors out of the parameters, as transformers makes them when it saves.

        Raises ModelError where they are not those that the checkpoint has.
        """
        network: Any = skeleton.network
        network._weight_conversions = skeleton.mapping
        made = revert_weight_conversion(skeleton.network, dict(parameters))
        if made.keys() != set(self.names):
            raise ModelError(
                f"{self.parameters[0]} cannot be merged: {self.names[0]} of the base, from which it is made,"
                " cannot be made from it again. --to adapter does without merging"
            )
        return made


def groups_of(skeleton: Skeleton, entries: Mapping[str, Stored]) -> tuple[list[Group], list[str]]:
    """(what becomes parameters, in the files' order; tensors that the architecture doesn't use).

    What a quantized checkpoint keeps beside a weight is in neither.
    """
    groups: dict[str, Group] = {}
    extra: list[str] = []
    beside = _beside(skeleton, entries)
    for name in sorted(entries, key=dot_natural_key):
        if name in beside:
            continue
        parameter, pattern = skeleton.parameter_of(name)
        if parameter not in skeleton.own:
            extra.append(name)
            continue
        converter = next((c for c in skeleton.converters if pattern in c.source_patterns), None)
        if pattern is None or converter is None:
            group = groups.setdefault(parameter, Group([parameter]))
        else:
            group = groups.setdefault(parameter, Group(_targets(parameter, converter), converter))
        group.names.append(name)
        group.patterns.append(pattern)
    twice = [group for group in groups.values() if group.converter is None and len(group.names) > 1]
    if twice:
        raise ModelError(f"{' and '.join(twice[0].names)} of the base are both {twice[0].parameters[0]}")
    return list(groups.values()), extra


def _targets(parameter: str, converter: WeightConverter) -> list[str]:
    first = converter.target_patterns[0]
    return [parameter.replace(first, target) for target in converter.target_patterns]


def _beside(skeleton: Skeleton, entries: Iterable[str]) -> set[str]:
    """Scales, codebooks and the like of a quantized checkpoint."""
    if skeleton.stored is None:
        return set()
    names = set(entries)
    weights = {name for name in names if name.endswith(".weight")}
    of_four_bits = {name for name in names if _beginnings(name) & weights}
    return of_four_bits | {name for name in names if name.rpartition(".")[2] in ("SCB", "weight_format")}


def _beginnings(name: str) -> set[str]:
    """A name's beginnings that end before a dot."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}
