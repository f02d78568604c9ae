"""What an adapter changes in the base, parameter by parameter, worked out without a single weight.

Legend: `I` inputs, `O` outputs of a linear layer, `r` rank, `V` vocabulary, `D` width, `R` rows of a block.

peft itself is asked which of the base's modules its config means, on a base without weights; so patterns,
layers, ranks and kinds mean here what they meant in training. Values are read from the adapter's file when
they are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lora_dpo.errors import ModelError
from lora_dpo.export.merging.shards import Tensors, blocks_of_rows
from lora_dpo.model import POLICY, SMALLEST_NORM
from lora_dpo.model.placing import put_on
from lora_dpo.model.saved import read_adapter
from lora_dpo.model.skeleton import Skeleton

ByRows = Callable[[Tensor, int], Tensor]
"""(rows of a weight in float32 [R, …], number of the first one) → the same rows with the adapter on."""


def values(tensors: Tensors, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """An adapter's tensor, or rows of it, in float32. Raises ModelError where it holds NaN or infinity."""
    found = tensors.read(name, first, count).float()
    if not bool(found.isfinite().all()):
        raise ModelError(f"{tensors.entries[name].file}: {name} holds values that are not finite")
    return found


@dataclass(frozen=True)
class LowRank:
    """W + s · B A, or with a magnitude m DoRA's m ⊙ (W + s · B A) / ‖W + s · B A‖, row by row.

    a, b, magnitude: names of the adapter's tensors, [r, I], [O, r] and [O].
    """

    a: str
    b: str
    scaling: float
    magnitude: str | None = None

    def opened(self, tensors: Tensors) -> ByRows:
        a = values(tensors, self.a) * self.scaling

        def rows(weight: Tensor, first: int) -> Tensor:
            b = values(tensors, self.b, first, len(weight))
            changed = torch.addmm(weight, b.to(weight.device), a.to(weight.device))
            if self.magnitude is None:
                return changed
            magnitude = values(tensors, self.magnitude, first, len(weight)).to(weight.device)
            norms = changed.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            return changed.div_(norms).mul_(magnitude[:, None])

        return rows


@dataclass(frozen=True)
class EmbeddingLowRank:
    """W + s · (B A)ᵀ. a, b: names of the adapter's tensors, [r, V] and [D, r]."""

    a: str
    b: str
    scaling: float

    def opened(self, tensors: Tensors) -> ByRows:
        a, b = values(tensors, self.a), values(tensors, self.b) * self.scaling

        def rows(weight: Tensor, first: int) -> Tensor:
            these = a[:, first : first + len(weight)]
            return torch.addmm(weight, these.t().to(weight.device), b.t().to(weight.device))

        return rows


@dataclass(frozen=True)
class Rows:
    """Rows of their own for some tokens. name: of the adapter's tensor [tokens, D]."""

    name: str
    tokens: tuple[int, ...]

    def opened(self, tensors: Tensors) -> ByRows:
        place = {token: n for n, token in enumerate(self.tokens)}

        def rows(weight: Tensor, first: int) -> Tensor:
            weight = weight.clone()
            for token in place.keys() & range(first, first + len(weight)):
                weight[token - first] = values(tensors, self.name, place[token], 1)[0].to(weight.device)
            return weight

        return rows


@dataclass(frozen=True)
class Whole:
    """A parameter that was trained in full. name: of the adapter's tensor."""

    name: str

    def opened(self, tensors: Tensors) -> ByRows:
        def rows(weight: Tensor, first: int) -> Tensor:
            found = (
                values(tensors, self.name, first, len(weight)) if weight.ndim else values(tensors, self.name)
            )
            return found.to(weight.device)

        return rows


@dataclass(frozen=True)
class Experts:
    """All experts of a layer in one parameter [E, …, …], a low-rank product for each.

    a [r·E, …], b [O, r·E]: as peft lays them out. swapped: whether an expert's matrix is [O, I], what B A is,
    or its transpose.
    """

    a: str
    b: str
    scaling: float
    experts: int
    swapped: bool

    def updates(self, tensors: Tensors) -> Callable[[int], Tensor]:
        """Expert's number → s · B A of that expert, in the orientation of the parameter, float32."""
        a, b = values(tensors, self.a), values(tensors, self.b) * self.scaling
        a, b = a.reshape(self.experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, self.experts)

        def update(expert: int) -> Tensor:
            product = b[..., expert] @ a[expert]
            return product if self.swapped else product.t()

        return update

    def opened(self, tensors: Tensors) -> ByRows:
        update = self.updates(tensors)

        def rows(weight: Tensor, first: int) -> Tensor:
            return weight + torch.stack([update(first + n).to(weight.device) for n in range(len(weight))])

        return rows


Change = LowRank | EmbeddingLowRank | Rows | Whole | Experts


def changes_of(skeleton: Skeleton, adapter: Path) -> dict[str, Change]:
    """What the adapter in a folder does to the base's parameters, by their names.

    Raises ModelError where it doesn't fit the base, is of a kind that can't be merged, or holds a tensor that
    has no place.
    """
    saved = read_adapter(str(adapter), "the adapter", shapes_only=True)
    bare = copy.deepcopy(skeleton.network)
    network = put_on(bare, saved, POLICY, compute_dtype=skeleton.compute_dtype, trainable=False)
    found: dict[str, Change] = {}
    used: set[str] = set()
    for path, module in network.named_modules():
        for parameter, change, names in _of_module(path, module):
            if parameter in found:
                raise ModelError(f"the adapter in {adapter} changes {parameter} twice, which is not merged")
            found[parameter] = change
            used |= set(names)
    for parameter, original in skeleton.tied.items():
        if _shares_tokens(network, parameter):
            found[parameter] = found[original]
    left = sorted(n for n in saved.tensors.keys() - used if _base_parameter(n) not in skeleton.own)
    if left or not used:
        raise ModelError(f"the adapter in {adapter} cannot be merged: {left[0] if left else 'it is empty'}")
    return found


def check_brought(skeleton: Skeleton, changes: Mapping[str, Change], adapter: Tensors, base: Tensors) -> None:
    """Raise ModelError where an adapter's file brings other whole weights than the base's.

    peft saves embeddings and head beside their factors; one whose vocabulary grew has others.
    """
    files = {skeleton.parameter_of(name)[0]: name for name in base.entries}
    files |= {
        one: files[other] for one, other in skeleton.tied.items() if other in files and one not in files
    }
    files |= {
        other: files[one] for one, other in skeleton.tied.items() if one in files and other not in files
    }
    for name in adapter.entries:
        parameter = _base_parameter(name)
        if parameter not in skeleton.own or changes.get(parameter) == Whole(name):
            continue
        shape, dtype = adapter.entries[name].shape, skeleton.own[parameter].dtype
        source = files.get(parameter, "")
        same = source in base.entries and base.entries[source].shape == shape
        for first, count in blocks_of_rows(shape or (1,)) if same else ():
            ours, theirs = (tensors.read(n, first, count) for tensors, n in ((base, source), (adapter, name)))
            same = same and torch.equal(ours.to(dtype), theirs.to(dtype))
        if not same:
            raise ModelError(
                f"{adapter.entries[name].file} brings another {parameter} than the base's: it was trained on"
                " another base, or on one whose vocabulary was resized, and cannot be merged into this one"
            )


def _base_parameter(name: str) -> str:
    """The base's parameter whose whole value an adapter's tensor of this name would be."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _of_module(path: str, module: nn.Module) -> Iterator[tuple[str, Change, list[str]]]:
    """(the base's parameter, what is done to it, names of the adapter's tensors) of one of peft's modules."""
    own = path.removeprefix("base_model.model.")
    if isinstance(module, ParamWrapper):
        yield _experts(path, own, module)
    elif isinstance(module, LoraLayer):
        yield _layer(path, own, module)
    elif isinstance(module, ModulesToSaveWrapper):
        for name, _ in module.original_module.named_parameters():
            yield f"{own}.{name}", Whole(f"{path}.{name}"), [f"{path}.{name}"]
    elif isinstance(module, TrainableTokensWrapper):
        adapter: Any = module.token_adapter
        if adapter.tied_adapter is None:
            name = f"{path}.token_adapter.trainable_tokens_delta"
            yield f"{own}.weight", Rows(name, tuple(adapter.token_indices[POLICY])), [name]
    elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not _is_part(path):
        raise ModelError(f"{own} is adapted in a way ({type(module).__name__}) that is not merged here")


def _shares_tokens(network: PeftModel, parameter: str) -> bool:
    """Whether a module has the trained tokens of the one that it is tied to."""
    module: Any = network.get_base_model().get_submodule(parameter.rpartition(".")[0])
    return isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None


def _is_part(path: str) -> bool:
    """peft's own layer inside a wrapper for trained tokens."""
    return path.endswith(".token_adapter")


def _layer(path: str, own: str, layer: Any) -> tuple[str, Change, list[str]]:
    variants = dict(layer.lora_variant)
    if type(layer) is Embedding and not variants:
        a, b = f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
        return f"{own}.weight", EmbeddingLowRank(a, b, layer.scaling[POLICY]), [a, b]
    dora = {name for name, variant in variants.items() if type(variant).__name__ == "DoraLinearVariant"}
    if type(layer) is not Linear or dora != variants.keys():
        kind = next((type(v).__name__ for v in variants.values()), type(layer).__name__)
        raise ModelError(f"{own} is adapted in a way ({kind}) that is not merged here")
    a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    magnitude = f"{path}.lora_magnitude_vector" if dora else None
    names = [a, b, magnitude] if magnitude else [a, b]
    return f"{own}.weight", LowRank(a, b, layer.scaling[POLICY], magnitude), names


def _experts(path: str, own: str, layer: Any) -> tuple[str, Change, list[str]]:
    while own.endswith(".base_layer"):  # several parameters of a module are wrapped one inside the other
        own = own.removesuffix(".base_layer")
    a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    parameter = f"{own}.{layer.parameter_name}"
    if layer.num_experts == 1:
        return parameter, LowRank(a, b, layer.scaling[POLICY]), [a, b]
    change = Experts(a, b, layer.scaling[POLICY], layer.num_experts, layer._did_swap_in_out_features)
    return parameter, change, [a, b]
