"""What an adapter's options name, found in the network: modules, layers, tokens, experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ModelError
from lora_dpo.recipe import Adapter


def target_modules(network: PreTrainedModel, adapter: Adapter) -> str | list[str]:
    """adapter.targets as PEFT takes them; every module by its whole path where adapter.layers chooses some.

    Raises ModelError where a name or layer is not in the network.
    """
    found = adapted_modules(network, adapter)
    if adapter.layers is None:
        return adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    if not found:
        raise ModelError(f"adapter.targets {adapter.targets} name nothing in the layers {adapter.layers}")
    return found


def adapted_modules(network: PreTrainedModel, adapter: Adapter) -> list[str]:
    """The paths of the modules that get an adapter. Raises ModelError where a name is of none."""
    if isinstance(adapter.targets, str):
        found = _all_linear(network)
    else:
        paths = {
            name: [path for path, _ in network.named_modules() if _ends_with(path, name)]
            for name in adapter.targets
        }
        unknown = [name for name, own in paths.items() if not own]
        if unknown:
            raise ModelError(f"adapter.targets names {unknown[0]}, which is no module of the base")
        found = list(dict.fromkeys(path for own in paths.values() for path in own))
    if adapter.layers is None:
        return found
    chosen = set(layer_numbers(adapter.layers, network.config.get_text_config().num_hidden_layers))
    return [path for path in found if _layer_of(path) in chosen]


def layer_numbers(text: str, count: int) -> list[int]:
    """The numbers that "0:8", "-4:" or "0,1,30:" stand for among so many layers. Raises ModelError."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.partition(":")
        bounds = [int(bound) for bound in (first, last) if bound]
        if any(not -count <= bound <= (count if colon else count - 1) for bound in bounds):
            raise ModelError(f"adapter.layers got {text!r}, but this model has {count} layers")
        whole = slice(int(first) if first else None, int(last) if last else None)
        numbers |= set(range(count)[whole]) if colon else {range(count)[int(first)]}
    if not numbers:
        raise ModelError(f"adapter.layers got {text!r}, which is none of this model's {count} layers")
    return sorted(numbers)


def _layer_of(path: str) -> int | None:
    """The first number in a path is its layer's; a later one may be an expert's."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _all_linear(network: PreTrainedModel) -> list[str]:
    head = network.get_output_embeddings()
    left_out = set(not_plain(network) or ())
    return [
        path
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and path not in left_out
    ]


def not_plain(network: nn.Module) -> list[str] | None:
    """Linear layers that "all-linear" leaves out, by path: not a product y = W x, or read past the module.

    Mamba's fused kernels take the weight of the mixer's out_proj itself, so an adapter there would be lost on
    CUDA; a router that is a subclass of a linear layer gives something else than its product (Llama 4).
    """
    found = []
    for path, module in network.named_modules():
        mixer = hasattr(module, "A_log") and hasattr(module, "D")
        if mixer and isinstance(getattr(module, "out_proj", None), nn.Linear):
            found.append(f"{path}.out_proj")
        if type(module).__module__.startswith("transformers.") and isinstance(module, nn.Linear):
            found += [] if _gives_a_product(module) else [path]
    return found or None


def _gives_a_product(module: nn.Linear) -> bool:
    with torch.no_grad():
        try:
            out: Any = module(module.weight.new_zeros(1, module.in_features))
        except (RuntimeError, ValueError, TypeError):
            return False
    return isinstance(out, torch.Tensor) and out.shape == (1, module.out_features)


def patterns(adapter: Adapter, option: str, adapted: Sequence[str]) -> dict[str, Any]:
    """adapter.ranks or adapter.alphas as PEFT takes them.

    Where there are several, every module gets its own: PEFT writes them to its file sorted by name, and when
    they are read again another one may be the first that fits. Raises ModelError where one fits no module.
    """
    values: dict[str, Any] = getattr(adapter, option)
    for name in values:
        if not any(_fits(path, name) for path in adapted):
            raise ModelError(f"adapter.{option} names {name}, which is no module that gets an adapter")
    if len(values) < 2:
        return dict(values)
    fitting = {path: [value for name, value in values.items() if _fits(path, name)] for path in adapted}
    return {re.escape(path): found[0] for path, found in fitting.items() if found}


def _fits(path: str, name: str) -> bool:
    """PEFT's own rule: a regular expression for the end of a path."""
    return re.match(rf"(.*\.)?({name})$", path) is not None


def saved_modules(network: PreTrainedModel, adapter: Adapter) -> list[str]:
    """The paths of adapter.modules_to_save. Raises ModelError for what can't be trained in full."""
    paths: list[str] = []
    for name in adapter.modules_to_save:
        found = [
            (path, module) for path, module in network.named_modules() if path and _ends_with(path, name)
        ]
        if not found:
            raise ModelError(f"adapter.modules_to_save names {name}, which is no module of the base")
        for path, module in found:
            _check_saved(network, path, module)
            paths.append(path)
    return list(dict.fromkeys(paths))


def _check_saved(network: PreTrainedModel, path: str, module: nn.Module) -> None:
    key = f"adapter.modules_to_save names {path}"
    parameters = list(module.parameters())
    if not parameters or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ModelError(f"{key}, which has no weight of its own; name the modules inside it")
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if any(isinstance(m, quantized) for m in module.modules()):
        raise ModelError(
            f"{key}, which is quantized; name it in adapter.targets, or use base.quantization=none"
        )
    if network.config.get_text_config().tie_word_embeddings:
        ends = {id(network.get_input_embeddings()), id(network.get_output_embeddings())}
        if any(id(m) in ends for m in module.modules()):
            raise ModelError(
                f"{key}, but head and embeddings are one matrix in this model, which a copy of either would"
                " part; adapter.trained_tokens trains some of its rows"
            )


def token_ids(
    tokens: Iterable[int | str], tokenizer: PreTrainedTokenizerBase | None, rows: int
) -> list[int] | None:
    """The ids of adapter.trained_tokens, sorted. rows: of the embedding. Raises ModelError."""
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    ids: set[int] = set()
    for token in tokens:
        number = vocabulary.get(token) if isinstance(token, str) else token
        if number is None:
            raise ModelError(
                f"adapter.trained_tokens names {token!r}, which is not one token of the tokenizer"
            )
        if number >= rows:
            raise ModelError(f"adapter.trained_tokens names {token!r}, but the model has {rows} embeddings")
        ids.add(number)
    return sorted(ids) or None


def check_experts(network: PreTrainedModel, adapter: Adapter) -> None:
    """Every one of adapter.expert_targets is a parameter of three dimensions. Raises ModelError."""
    shapes = {path: parameter.ndim for path, parameter in network.named_parameters()}
    for name in adapter.expert_targets:
        found = [ndim for path, ndim in shapes.items() if _ends_with(path, name)]
        if not found:
            raise ModelError(f"adapter.expert_targets names {name}, which is no parameter of the base")
        if any(ndim != 3 for ndim in found):
            raise ModelError(
                f"adapter.expert_targets names {name}, which does not hold several experts in one parameter;"
                " linear layers belong in adapter.targets"
            )
