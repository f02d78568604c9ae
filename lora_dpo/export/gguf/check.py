"""Whether a GGUF file holds what it was converted from, as far as that can be read back.

Tensors are compared by their values, rounded as the file's dtype rounds them. Converters rearrange some:
llama.cpp turns pairs of rotary halves in Llama's queries and keys, adds 1 to Gemma's norms, stacks experts.
What was rearranged in a way that isn't known here is compared as a set of values, or by its shape, and said.
Needs the `gguf` package; without it nothing can be said.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_dpo.export.gguf.file import DTYPES, GgufFile, GgufTensor
from lora_dpo.export.gguf.names import Place, known_names, place_of
from lora_dpo.export.gguf.tensors import Stored, headers

Change = Callable[[Tensor], Tensor]
_Kind = tuple[str, Change | None]
"""(field of Check, what is done to the source; None: nothing)."""

ROWS = 2**24
"""About how many values are compared at a time."""

TURNED = frozenset({"llama", "granite", "smollm3"})
"""GGUF's names of architectures whose queries and keys must be turned; Mistral and Mixtral are llama too."""

KNOWN = TURNED | {"qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmo2", "starcoder2", "command-r", "seed_oss"}
"""Those that were converted and read back here: nothing else is changed in them, other values are wrong."""

UNUSED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Endings of tensors that models keep and no file needs: they are computed."""


@dataclass(frozen=True)
class Check:
    """What a look at a GGUF file found.

    findings: what is wrong, in words. equal: tensors whose values are the source's. turned: those whose
    values are the source's after the rearrangement that is known of them. reordered: those that have the same
    values in an order not known here. shapes: of those only number of values and shape were compared. made:
    tensors that the converter computed from the config. notes: what else there is to know.
    """

    findings: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """How many tensors were looked at."""
        return len(self.equal) + len(self.turned) + len(self.reordered) + len(self.shapes)

    def describe(self) -> list[str]:
        """Lines for a person."""
        parts = [f"{len(self.equal)} to the bit"]
        parts += [f"{len(self.turned)} to the bit in llama.cpp's order"] if self.turned else []
        parts += [f"{len(self.reordered)} as the same values in another order"] if self.reordered else []
        parts += [f"{len(self.shapes)} by shape only ({self.shapes[0]}, …)"] if self.shapes else []
        lines = [f"checked against its source: {self.compared} tensors, {', '.join(parts)}"]
        lines += [f"computed by the converter: {', '.join(self.made)}"] if self.made else []
        return lines + self.notes + [f"wrong: {finding}" for finding in self.findings]


def package_is_there() -> bool:
    """Whether the `gguf` package can be imported."""
    return importlib.util.find_spec("gguf") is not None


def check_model(file: Path, merged: Path) -> Check | None:
    """Compare a GGUF model with the merged folder that it was made from; None without the gguf package.

    Raises ModelError where it is no whole GGUF file.
    """
    if not package_is_there():
        return None
    from lora_dpo.export.gguf.metadata import check_metadata

    check = Check()
    opened = GgufFile.open(file)
    check_metadata(check, opened, merged)
    _check_tensors(check, opened, headers(merged))
    return check


def check_adapter(file: Path, adapter: Path, base: Any) -> Check | None:
    """Compare a GGUF adapter with the folder in PEFT's layout that it was made from; None without gguf.

    base: the config of the base, whose heads say how queries and keys are turned. Raises ModelError where it
    is no whole GGUF file.
    """
    if not package_is_there():
        return None
    from lora_dpo.export.gguf.metadata import check_adapter_metadata

    check = Check()
    opened = GgufFile.open(file)
    check_adapter_metadata(check, opened, adapter)
    heads = getattr(base, "num_attention_heads", None), getattr(base, "num_key_value_heads", None)
    _check_tensors(check, opened, headers(adapter, "adapter_model.safetensors"), heads)
    return check


def _check_tensors(
    check: Check,
    file: GgufFile,
    sources: Mapping[str, Stored],
    heads: tuple[int | None, int | None] | None = None,
) -> None:
    names = known_names(file.architecture, file.layers or _layers(sources))
    if names is None:
        check.findings.append(
            f"the gguf package here doesn't know the architecture {file.architecture!r}: nothing was compared"
            " (a newer one may know it)"
        )
        return
    query_heads, key_heads = heads or (
        file.number("attention.head_count"),
        file.number("attention.head_count_kv"),
    )
    used: set[str] = set()
    for name, source in sorted(sources.items()):
        if name.endswith(UNUSED):
            continue
        place = place_of(name, names)
        if place is None:
            check.notes.append(f"{name} has no name in GGUF that is known here: not compared")
            continue
        used.add(place.name)
        tensor = file.tensors.get(place.name)
        if tensor is None:
            check.findings.append(f"{name} should be there as {place.name}, and is not")
            continue
        heads_of = {"attn_q": query_heads, "attn_k": key_heads or query_heads}
        changes = _changes(file.architecture, heads_of.get(place.part) if place.may_turn else None)
        _compare(check, source, tensor, place, changes, file.architecture in KNOWN)
    check.made.extend(sorted(file.tensors.keys() - used))


def _layers(sources: Mapping[str, Stored]) -> int:
    numbers = [int(part) for name in sources for part in name.split(".") if part.isdecimal()]
    return max(numbers, default=0) + 1


def _compare(
    check: Check, source: Stored, tensor: GgufTensor, place: Place, changes: Iterable[_Kind], known: bool
) -> None:
    """Add a tensor to the findings or to those that were compared. changes: what may have been done to it.
    known: whether it can be nothing else.
    """
    name = source.name
    if tensor.dtype not in DTYPES:
        check.findings.append(f"{place.name} is stored as {tensor.dtype}, which was not asked for")
        return
    shape = tensor.shape if place.expert is None else tensor.shape[1:]
    wanted = source.shape[::-1] if place.transposed else source.shape
    flat = tuple(n for n in wanted if n != 1)
    if tuple(n for n in shape if n != 1) not in (flat, flat[::-1]):
        check.findings.append(f"{place.name} has the shape {list(shape)}, and {name} {list(wanted)}")
        return
    if not _is_finite(tensor, place):
        check.findings.append(f"{place.name} holds values that are not finite: {tensor.dtype} is too narrow")
        return
    for kind, change in changes:
        if _is_equal(source, tensor, place, change):
            getattr(check, kind).append(name)
            return
    if known:
        check.findings.append(f"{place.name} has other values than {name}")
    elif _same_values(source, tensor, place):
        check.reordered.append(name)
    else:
        check.shapes.append(name)


def _changes(architecture: str, heads: int | None) -> Iterator[_Kind]:
    """The rearrangements to try, in turn. heads: of a tensor whose rows are queries' or keys'."""
    if heads and architecture in TURNED:
        yield "turned", lambda whole: turn(whole, heads)
        return
    yield "equal", None
    if architecture in KNOWN:
        return
    if heads:
        yield "turned", lambda whole: turn(whole, heads)
    yield "turned", lambda whole: whole.T
    yield "turned", lambda whole: whole.float() + 1
    yield "turned", lambda whole: whole + 1


def turn(rows: Tensor, heads: int) -> Tensor:
    """Queries' or keys' rows as llama.cpp's Llama has them: of each head, the halves' rows interleaved.

    [h0 r0..r(d/2−1), r(d/2)..r(d−1)] becomes r0, r(d/2), r1, r(d/2 + 1), ….
    """
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, 2, half, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _blocks(source: Stored) -> Iterator[tuple[int, int]]:
    if len(source.shape) < 2:
        yield 0, max(source.count, 1)
        return
    step = max(1, ROWS // max(1, source.count // max(1, source.shape[0])))
    for start in range(0, source.shape[0], step):
        yield start, min(start + step, source.shape[0])


def _is_equal(source: Stored, tensor: GgufTensor, place: Place, change: Change | None) -> bool:
    if change is None and not place.transposed:
        rows = tensor.rows(place.expert)
        if len(source.shape) < 2 or rows != source.shape[0]:
            return _same(source.read(), tensor.read(place.expert))
        return all(_same(source.read(a, b), tensor.read(place.expert, a, b)) for a, b in _blocks(source))
    whole = source.read()
    whole = whole.T if place.transposed else whole
    return _same(whole if change is None else change(whole), tensor.read(place.expert))


def _same(source: Tensor, stored: Tensor) -> bool:
    """Whether stored [.] has the source's values, rounded to the dtype that it is stored in."""
    if source.numel() != stored.numel():
        return False
    if [n for n in source.shape if n != 1] != [n for n in stored.shape if n != 1]:
        return False
    return torch.equal(source.float().to(stored.dtype).flatten(), stored.flatten())


def _same_values(source: Stored, tensor: GgufTensor, place: Place) -> bool:
    """Whether both hold the same values in whatever order: sums over a hash of each value's bits."""
    wanted = found = 0
    for a, b in _blocks(source):
        rounded = (
            (source.read(a, b) if len(source.shape) > 1 else source.read()).float().to(tensor.torch_dtype)
        )
        wanted += _order_free(rounded)
    for a, b in tensor.blocks(place.expert, ROWS):
        found += _order_free(tensor.read(place.expert, a, b))
    return wanted & _MASK == found & _MASK


_MASK = 2**63 - 1


def _order_free(values: Tensor) -> int:
    bits = values.float().contiguous().view(torch.int32).to(torch.int64)
    mixed = (bits * 0x9E3779B1) ^ (bits >> 7)
    return int((mixed * (mixed | 1)).sum()) & _MASK


def _is_finite(tensor: GgufTensor, place: Place) -> bool:
    blocks = tensor.blocks(place.expert, ROWS)
    return all(bool(torch.isfinite(tensor.read(place.expert, a, b)).all()) for a, b in blocks)
