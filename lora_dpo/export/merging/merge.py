"""The streaming merge: the base's files in, the merged model's files out, a few rows at a time.

Legend: W what the base multiplies with, Δ the adapter's update, T = W + Δ what is wanted, S what is stored.

Each tensor is read, brought to what the base computes with (quantized and dequantized again, where
bitsandbytes quantized it), changed in float32 and rounded once. Its place in the files, its name and its
layout stay the base's own, so that whatever reads the base reads the merged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lora_dpo.errors import ModelError
from lora_dpo.export.merging.changes import Change, Experts
from lora_dpo.export.merging.conversions import Group, groups_of
from lora_dpo.export.merging.kept import Kept
from lora_dpo.export.merging.quantized import EightBit, FourBit
from lora_dpo.export.merging.shards import Part, Tensors, blocks_of_rows
from lora_dpo.model.skeleton import Skeleton


@dataclass(eq=False)
class Merge:
    """A base, an adapter, and how they are to be merged.

    base, adapter: their tensors. changes: by parameter. original: whether the update is added to the weights
    as the checkpoint holds them, instead of those that were trained on. kept: what is measured on the way.
    """

    skeleton: Skeleton
    base: Tensors
    adapter: Tensors
    changes: Mapping[str, Change]
    dtype: torch.dtype
    original: bool
    kept: dict[str, Kept] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock)
    _at_work: tuple[str, Any] = ("", None)

    @property
    def untied(self) -> dict[str, str]:
        """Parameters that were one with another in the base, and aren't any more: name → the other's."""
        tied = self.skeleton.tied
        return {
            name: other for name, other in tied.items() if self.changes.get(name) != self.changes.get(other)
        }

    def parts(self) -> list[Part]:
        """Every tensor of the merged model. Raises ModelError for what can't be merged."""
        found: list[Part] = []
        sources: dict[str, str] = {}
        groups, extra = groups_of(self.skeleton, self.base.entries)
        for group in groups:
            sources |= dict.fromkeys(group.parameters, group.names[0])
            found += self._of_group(group)
        found += [self._as_it_is(name) for name in extra]
        for name, other in self.untied.items():  # what was one is two now
            for missing, there in ((name, other), (other, name)):
                if missing not in sources and there in sources:
                    found.append(self._plain(missing, sources[there], missing))
        shared = self.skeleton.tied.keys() | set(self.skeleton.tied.values())
        missing = sorted(self.changes.keys() - sources.keys() - shared)
        if missing:
            raise ModelError(f"the adapter changes {missing[0]}, which the base's files do not hold")
        return found

    def _of_group(self, group: Group) -> Iterator[Part]:
        parameters = group.parameters
        if group.converter is None:
            # Of two that are one the files may hold either, or both: each is written under its name.
            yield self._plain(group.names[0], group.names[0], parameters[0])
        elif not any(p in self.changes or self.skeleton.is_quantized(p) for p in parameters):
            yield from (self._as_it_is(name, parameters[0]) for name in group.names)
        elif group.is_of_experts and isinstance(self.changes[parameters[0]], Experts):
            yield from self._experts(group, parameters[0])
        else:
            yield from Converted(self, group).parts()

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Of a parameter in the merged model: float32 where the architecture keeps that one so."""
        own = self.skeleton.own[parameter].dtype
        if not own.is_floating_point:
            return own
        return torch.float32 if parameter in self.skeleton.wide else self.dtype

    def _loaded(self, rows: Tensor, parameter: str) -> Tensor:
        """Rows as a checkpoint holds them → as the base computes with them, float32."""
        if not self.original:
            rows = rows.to(self.skeleton.own[parameter].dtype)
        return rows.to(self.skeleton.device).float()

    def _as_it_is(self, name: str, parameter: str | None = None) -> Part:
        """A tensor that no adapter changes: in the parameter's dtype, or to the bit where it is none's."""
        entry, dtype = self.base.entries[name], self.base.dtype(name)
        if parameter is not None and dtype.is_floating_point:
            dtype = self.stored_dtype(parameter)

        def blocks() -> Iterator[Tensor]:
            for first, count in blocks_of_rows(entry.shape or (1,)):
                rows = self.base.read(name, first, count)
                if parameter is not None and rows.is_floating_point():
                    rows = _rounded(self._loaded(rows, parameter), dtype, name)
                yield rows

        return Part(name, dtype, entry.shape, blocks)

    def _plain(self, name: str, source: str, parameter: str) -> Part:
        """A tensor of the files that is one parameter of the model."""
        own = self.skeleton.own[parameter]
        if not own.is_floating_point():
            return self._as_it_is(source)
        dtype, shape = self.stored_dtype(parameter), tuple(own.shape)
        if not self.skeleton.is_quantized(parameter) and shape != self.base.entries[source].shape:
            raise ModelError(
                f"{source} of the base is {list(self.base.entries[source].shape)}, and its architecture's"
                f" {parameter} is {list(shape)}"
            )

        def blocks() -> Iterator[Tensor]:
            if self.skeleton.is_transposed(parameter):
                yield self._transposed(source, parameter, name)
            else:
                yield from self.changed(self._rows(source, parameter), parameter, name)

        return Part(name, dtype, shape, blocks)

    def _rows(self, source: str, parameter: str) -> Iterable[Tensor]:
        """The base's rows in float32, by blocks."""
        if self.skeleton.is_quantized(parameter) and not self.original:
            yield from quantized_rows(self._quantized(source, self.base.read(source), parameter))
            return
        shape = self.base.entries[source].shape
        if not shape:
            yield self._loaded(self.base.read(source), parameter)
            return
        for first, count in blocks_of_rows(shape):
            yield self._loaded(self.base.read(source, first, count), parameter)

    def _transposed(self, source: str, parameter: str, name: str) -> Tensor:
        """The whole of a weight whose file holds [I, O]."""
        weight = self.base.read(source)
        if self.skeleton.is_quantized(parameter) and not self.original:
            stored = self.skeleton.stored is not None  # then it lies as an ordinary one does
            weight = weight if stored else weight.T.contiguous()
            rows = quantized_rows(self._quantized(source, weight, parameter))
        else:
            rows = [self._loaded(weight, parameter).T.contiguous()]
        return torch.cat(list(self.changed(rows, parameter, name))).T.contiguous()

    def _quantized(self, source: str, weight: Tensor, parameter: str) -> FourBit | EightBit:
        """A weight [O, I], or what a quantized checkpoint holds of it, as the base has it in memory."""
        base, skeleton = self.skeleton.base, self.skeleton
        if skeleton.stored is not None:
            ends = {n.removeprefix(f"{source}."): n for n in self.base.entries if n.startswith(f"{source}.")}
            beside = {end: self.base.read(name).to(skeleton.device) for end, name in ends.items()}
            weight = weight.to(skeleton.device)
            if base.quantization == "int8":
                return EightBit(
                    weight, self.base.read(f"{source.removesuffix('weight')}SCB").to(skeleton.device)
                )
            return FourBit.stored(weight, beside, skeleton.compute_dtype)
        weight = weight.to(skeleton.compute_dtype).to(skeleton.device)
        if base.quantization == "int8":
            return EightBit.of(weight)
        return FourBit.of(weight, base.quantization, double=base.double_quantization)

    def changed(self, blocks: Iterable[Tensor], parameter: str, name: str) -> Iterator[Tensor]:
        """Blocks of W in float32 → blocks of S. name: under which what is kept is counted."""
        change, dtype = self.changes.get(parameter), self.stored_dtype(parameter)
        change_rows = None if change is None else change.opened(self.adapter)
        first = 0
        for weight in blocks:
            if change_rows is None:
                yield _rounded(weight, dtype, name)
            else:
                yield self._stored(weight, change_rows(weight, first), dtype, name)
            first += len(weight) if weight.ndim else 1

    def _stored(self, weight: Tensor, wanted: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        stored = _rounded(wanted, dtype, name)
        self.kept.setdefault(name, Kept()).add(weight, wanted, stored.to(weight.device).float())
        return stored

    def whole(self, weight: Tensor, parameter: str, name: str) -> Tensor:
        """S of a whole parameter, from what the checkpoint's tensors were converted to."""
        if self.skeleton.is_quantized(parameter) and not self.original:
            blocks: Iterable[Tensor] = quantized_rows(self._quantized(name, weight.contiguous(), parameter))
        else:
            blocks = [self._loaded(weight, parameter)]
        return torch.cat(list(self.changed(blocks, parameter, name)))

    def _experts(self, group: Group, parameter: str) -> Iterator[Part]:
        """The experts' matrices, one a tensor, of a parameter that holds them all."""
        offset = 0
        for names in group.by_pattern():
            height = self.base.entries[names[0]].shape[0]
            for expert, name in enumerate(names):
                yield self._expert(name, parameter, expert, slice(offset, offset + height))
            offset += height

    def _expert(self, name: str, parameter: str, expert: int, rows: slice) -> Part:
        """rows: of the expert's matrix in the parameter, those that are in this tensor."""
        dtype = self.stored_dtype(parameter)

        def blocks() -> Iterator[Tensor]:
            weight = self._loaded(self.base.read(name), parameter)
            update = self._updates(parameter)(expert)[rows]
            yield self._stored(weight, weight + update.to(weight.device), dtype, name)

        return Part(name, dtype, self.base.entries[name].shape, blocks)

    def _updates(self, parameter: str) -> Callable[[int], Tensor]:
        """Of the parameter that is at work: its factors are read once for all experts."""
        change = self.changes[parameter]
        assert isinstance(change, Experts)
        with self._lock:
            if self._at_work[0] != parameter:
                self._at_work = parameter, change.updates(self.adapter)
            return self._at_work[1]


class Converted:
    """Tensors that are made into parameters, changed, and made back, all of a group at once."""

    def __init__(self, merge: Merge, group: Group):
        self.merge, self.group = merge, group
        self.made: dict[str, Tensor] = {}
        self.lock = Lock()

    def parts(self) -> list[Part]:
        entries, dtype = self.merge.base.entries, self.merge.stored_dtype(self.group.parameters[0])
        return [Part(n, dtype, entries[n].shape, partial(self._blocks, n)) for n in self.group.names]

    def _blocks(self, name: str) -> Iterator[Tensor]:
        with self.lock:
            if name not in self.made:
                self.made = self._make()
            yield self.made.pop(name)

    def _make(self) -> dict[str, Tensor]:
        skeleton = self.merge.skeleton
        parameters = self.group.convert({n: self.merge.base.read(n) for n in self.group.names}, skeleton)
        changed = {name: self.merge.whole(weight, name, name) for name, weight in parameters.items()}
        return self.group.revert(changed, skeleton)


def quantized_rows(weight: FourBit | EightBit) -> Iterator[Tensor]:
    """A quantized weight by blocks of rows, float32."""
    for first, count in blocks_of_rows(weight.shape, weight.step):
        yield weight.rows(first, count).float()


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In the dtype that is stored, on the CPU. Raises ModelError where a value doesn't fit it."""
    out = tensor.to(dtype).cpu()
    if not bool(torch.isfinite(out).all()):
        kind = str(dtype).removeprefix("torch.")
        reason = "holds values that are not finite" if not bool(torch.isfinite(tensor).all()) else None
        raise ModelError(
            f"{name} {reason}" if reason else f"{name} does not fit {kind}: export with --dtype bf16 or fp32"
        )
    return out
