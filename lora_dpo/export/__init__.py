"""From a run to what is served elsewhere: a standalone adapter, or a merged model with a measured
difference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_dpo.batching import pack
from lora_dpo.errors import ModelError, RunError
from lora_dpo.finished import FinishedRun, check_adapter
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import (
    Model,
    as_base,
    dequantized,
    dora_matrix,
    load_config,
    load_model,
    without_dropout,
)
from lora_dpo.recipe import Base
from lora_dpo.run_directory import MANIFEST, RunDirectory, need_space, write_folder, write_text

PEFTS_OWN = (LoraLayer, AuxiliaryTrainingWrapper)
MergedDtype = Literal["bfloat16", "float16", "float32"]


def export_adapter(run: RunDirectory, to: Path) -> Path:
    """Copy a run's adapter, tokenizer and template to a new folder, in PEFT's layout.

    Raises RunError if the run has none yet or the folder is there already.
    """
    check_adapter(run)
    refuse_existing(to)
    need_space(to, sum(file.stat().st_size for file in run.adapter_folder.iterdir()), "the adapter")
    write_folder(to, lambda part: _copy_files(run.adapter_folder, part))
    return to


def _copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.name != MANIFEST:
            shutil.copyfile(file, target / file.name)


def refuse_existing(folder: Path) -> None:
    """Raise RunError if something is there already: an export overwrites nothing."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder} is there already and is not empty: choose another with --output")


@dataclass(frozen=True)
class MergeDifference:
    """How a merged model, reloaded from disk, differs from base + adapter on held-out examples.

    mean, largest: |Δ log-prob| of a scored token in nats. tokens: how many were compared.
    update: the same mean between the base and base + adapter, to see the difference in proportion.
    """

    tokens: int
    mean: float
    largest: float
    update: float


def export_merged(run: FinishedRun, to: Path, *, dtype: MergedDtype = "bfloat16") -> Path:
    """Write a plain transformers model: each quantized weight dequantized, the adapter's update added in
    float32.

    The weights are those of the base that was trained on (dequantized, not the original 16-bit ones), so the
    merged model is the function that was trained, up to the rounding to `dtype`. Raises RunError if the
    folder
    is there already, ModelError if a weight doesn't fit the dtype.
    """
    refuse_existing(to)
    need_space(to, _merged_size(run.model, getattr(torch, dtype)), "the merged model")
    merged = merged_network(run.model, run.recipe.base, getattr(torch, dtype))

    def fill(part: Path) -> None:
        merged.save_pretrained(str(part))
        run.data.tokenizer.save(part)

    write_folder(to, fill)
    return to


def _merged_size(model: Model, dtype: torch.dtype) -> int:
    """About how many bytes the merged weights take: two 4-bit values lie in one byte."""
    packed = {id(m.weight) for m in model.network.modules() if isinstance(m, bnb.nn.Linear4bit)}
    parameters = [p for p in model.network.parameters() if not p.requires_grad]
    return sum(p.numel() * (2 if id(p) in packed else 1) for p in parameters) * dtype.itemsize


def merged_network(model: Model, base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The model without quantization and adapter, its weights on the CPU in `dtype`."""
    config = load_config(base)
    config.dtype = dtype
    if config.get_text_config().tie_word_embeddings and not _still_tied(model):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        weights = dict(_merged_tensors(model.causal, plain, dtype))
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, p in plain.named_parameters() if p.is_meta]
    if missing:
        raise ModelError(f"{missing[0]} is in the base's architecture but was not loaded: it can't be merged")
    plain.generation_config = model.causal.generation_config
    return plain


def _still_tied(model: Model) -> bool:
    """Whether head and embeddings, one weight in the base, are still one with the adapter merged."""
    embeddings, head = model.causal.get_input_embeddings(), model.head
    changed = [module for module in (embeddings, head) if isinstance(module, PEFTS_OWN)]
    return not changed or torch.equal(merged_weight(embeddings).float(), merged_weight(head).float())


def _merged_tensors(source: nn.Module, plain: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter and saved buffer of the plain model, from the source's same-named
    module.
    """
    saved = set(plain.state_dict().keys())
    for path, module in plain.named_modules():
        names = [*module._parameters, *module._buffers]
        own = _module_at(source, path)
        for name in names:
            full = f"{path}.{name}".lstrip(".")
            if full not in saved:
                continue
            tensor = merged_parameter(own, name)
            if name == "weight" and tensor is not None and _is_transposed(module, own):
                tensor = tensor.T.contiguous()
            if tensor is not None:
                yield full, _rounded(tensor, dtype, full)


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of the plain model, also below one that an adapter was put around."""
    module: Any = root
    for part in path.split(".") if path else ():
        if isinstance(module, LoraLayer) and not hasattr(module, part):
            module = module.get_base_layer()
        module = getattr(module, part)
    return module


def _is_transposed(plain: nn.Module, source: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed; bitsandbytes puts an ordinary linear layer in its place."""
    return isinstance(plain, Conv1D) and not isinstance(_unwrapped(source), Conv1D)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().cpu()
    out = tensor.detach().to(device="cpu", dtype=dtype)
    if not bool(torch.isfinite(out).all()):
        raise ModelError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: export with --dtype bfloat16"
        )
    return out


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that acts in this place when adapters are on, without the products that are added to it."""
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    if isinstance(module, TrainableTokensWrapper):
        return module.original_module
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def merged_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter or buffer as it acts with the adapter on; a weight comes dequantized."""
    if name == "weight" and not isinstance(module, ParamWrapper):
        return merged_weight(module)
    tensor: Tensor | None = getattr(_unwrapped(module), name)
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name and tensor is not None:
            updates = [module.get_delta_weight(adapter) for adapter in module.active_adapters]
            tensor = tensor.float() + torch.stack(updates).sum(dim=0).float()
        module = module.base_layer
    return tensor


def merged_weight(module: nn.Module) -> Tensor:
    """A module's weight as it acts: dequantized, with the adapter's update (alpha / rank) B A added in
    float32, or with DoRA's magnitudes, or with the rows of trained tokens.
    """
    weight = dequantized(_unwrapped(module))
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
    if not isinstance(module, LoraLayer):
        return weight
    layer: Any = module
    names = [name for name in layer.active_adapters if name in layer._get_available_adapters()]
    if names and names[0] in layer.lora_variant:
        matrix = dora_matrix(layer, names[0])
        return matrix.T if getattr(layer, "fan_in_fan_out", False) else matrix
    for name in names:
        weight = weight.float() + layer.get_delta_weight(name).float()
    return weight


def verify_merged(
    run: FinishedRun, folder: Path, *, dtype: MergedDtype, examples: int = 32
) -> MergeDifference | None:
    """Reload the merged model from disk and compare its token log-probs with base + adapter's.

    On a card that has no room for it beside the base, it is reloaded on the CPU, for four examples. None if
    the run has no held-out rows. Also written to export_report.json.
    """
    base = Base(str(folder), quantization="none", compute_dtype=dtype, device=run.recipe.base.device)
    if _crowded(run.model, folder):
        base, examples = replace(base, device="cpu"), 4
    held_out = run.data.eval[:examples]
    if not held_out:
        return None
    trained = _token_logprobs(run.model, held_out, run.tokens_per_microbatch)
    with as_base(run.model):
        untrained = _token_logprobs(run.model, held_out, run.tokens_per_microbatch)
    reloaded = load_model(base)
    gap = (_token_logprobs(reloaded, held_out, run.tokens_per_microbatch) - trained).abs()
    update = (trained - untrained).abs().mean().item()
    result = MergeDifference(len(gap), gap.mean().item(), gap.max().item(), update)
    write_text(folder / "export_report.json", json.dumps(vars(result), indent=1))
    return result


def _crowded(model: Model, folder: Path) -> bool:
    """Whether the merged files, and a tenth for the forward pass, don't fit on the card beside the model."""
    if model.device.type != "cuda":
        return False
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return torch.cuda.mem_get_info(model.device)[0] < 1.1 * size


def _token_logprobs(model: Model, branches: list, tokens_per_microbatch: int) -> Tensor:
    with torch.no_grad(), without_dropout(model):
        batches = pack(branches, tokens_per_microbatch, model.way)
        return torch.cat([token_logprobs(model, batch.to(model.device)).cpu() for batch in batches])
