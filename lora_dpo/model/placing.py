"""A saved adapter put on a base, complete: LoRA's factors, those of embeddings too, trained tokens and whole
saved modules.
"""

from __future__ import annotations

import copy
import re
import warnings
from operator import attrgetter
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ModelError
from lora_dpo.model.saved import SavedAdapter, called
from lora_dpo.model.score import add_score_head, holds_score, tell_task

HALF = (torch.bfloat16, torch.float16)


def put_on(
    network: PreTrainedModel | PeftModel,
    saved: SavedAdapter,
    name: str,
    *,
    compute_dtype: torch.dtype,
    trainable: bool,
    dropout: float = 0.0,
) -> PeftModel:
    """Add an adapter to a model under a name, its values float32; what was there keeps its requires_grad.

    Raises ModelError where adapter and base don't fit, or some tensor finds no place.
    """
    if saved.config.use_dora and isinstance(network, PeftModel) and _in_int8(network):
        # peft dequantizes the weight for DoRA's magnitudes, and the second time loses its scales.
        raise _does_not_fit(saved, "DoRA beside another adapter needs base.quantization=nf4, fp4 or none")
    config = copy.deepcopy(saved.config)
    config.inference_mode = not trainable
    config.lora_dropout = dropout
    config.init_lora_weights = True  # every value is replaced: only the quickest counts
    config.task_type = "CAUSAL_LM"
    config.revision = None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    if holds_score(config.modules_to_save):
        causal = network.get_base_model() if isinstance(network, PeftModel) else network
        add_score_head(cast(PreTrainedModel, causal))
    # peft freezes or thaws what is there already: saved modules of the adapter that is on, above all.
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        adapted = _added(network, config, name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a config that is anybody's makes peft raise anything
        raise _does_not_fit(saved, f"{error}") from error
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    tell_task(adapted, name)
    ask_for_own_tokens(adapted)
    new = parameters_of(adapted, name)
    widen_copies(adapted)
    for parameter in new.values():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(trainable)
    _fill(adapted, saved, name, new)
    return adapted


def _in_int8(network: nn.Module) -> bool:
    return any(isinstance(module, bnb.nn.Linear8bitLt) for module in network.modules())


def parameters_of(network: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the model, found by where they sit."""
    own: set[int] = set()
    for module in network.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for where in module.adapter_layer_names:
                held = attrgetter(where)(module)
                part = held[name] if name in held else nn.Module()
                parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
                own |= {id(parameter) for parameter in parameters}
    return {n: p for n, p in network.named_parameters() if id(p) in own}


def _added(network: PreTrainedModel | PeftModel, config: LoraConfig, name: str) -> PeftModel:
    with warnings.catch_warnings():
        # peft asks transformers about checkpointing by an older name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        if not isinstance(network, PeftModel):
            config.base_model_name_or_path = None
            return cast(PeftModel, get_peft_model(network, config, adapter_name=name))
        config.base_model_name_or_path = next(iter(network.peft_config.values())).base_model_name_or_path
        network.add_adapter(name, config)
        return network


def _fill(network: PeftModel, saved: SavedAdapter, name: str, own: dict[str, nn.Parameter]) -> None:
    """Copy the saved values in; every tensor must find its place and every place its tensor."""
    base = {n: p for n, p in network.named_parameters(remove_duplicate=False) if n not in own}
    tensors = dict(saved.tensors)
    for key in tensors.keys() & base.keys():
        # peft saves whole embeddings where they were targeted or resized, and would write them to the base.
        value = tensors.pop(key)
        # On the meta device there is nothing to compare with: a merge does it with the base's files.
        known = not base[key].is_meta
        if value.shape != base[key].shape or (known and not torch.equal(value.to(base[key]), base[key])):
            raise _does_not_fit(saved, f"it brings another {key.removeprefix('base_model.model.')}")
    try:
        result = set_peft_model_state_dict(network, tensors, adapter_name=name)
    except KeyError as error:
        raise _does_not_fit(saved, f"it lacks {error}") from error
    except RuntimeError as error:
        raise _does_not_fit(saved, _shapes_in_words(str(error))) from error
    missing = [n for n in result.missing_keys if n in own]
    if missing or result.unexpected_keys:
        reason = f"it lacks {missing[0]}" if missing else f"there is no place for {result.unexpected_keys[0]}"
        raise _does_not_fit(saved, reason)


def _shapes_in_words(text: str) -> str:
    """What torch says of tensors whose shapes differ, the first of them in words."""
    found = _MISMATCH.findall(text)
    if not found:
        return " ".join(text.split())
    name, there, here = found[0]
    more = f", and {len(found) - 1} others differ too" if len(found) > 1 else ""
    name = re.sub(r"(\.lora_[AB])\.\w+\.", r"\1.", name.removeprefix("base_model.model."))
    return f"its {name} is {there}, and by this base and its config it has to be {here}{more}"


_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


def _does_not_fit(saved: SavedAdapter, reason: str) -> ModelError:
    return ModelError(f"{called(saved.key, saved.folder)} does not fit this base: {reason}")


def ask_for_own_tokens(network: PeftModel) -> None:
    """Let modules with trained tokens answer for the adapters that have some there.

    peft asks each of them for the tokens of every adapter, and fails where one has none.
    """
    for module in network.modules():
        if isinstance(module, TrainableTokensWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                setattr(module, method, _OwnTokens(module, method))


class _OwnTokens:
    """A method of peft's wrapper, for the adapters that it holds; nothing for the others."""

    def __init__(self, wrapper: Any, method: str):
        self.wrapper, self.method = wrapper, method

    def __call__(self, adapter_name: str, *arguments: Any) -> dict[str, Any]:
        if adapter_name not in self.wrapper._get_available_adapters():
            return {}
        return getattr(type(self.wrapper), self.method)(self.wrapper, adapter_name, *arguments)


def widen_copies(network: PeftModel) -> None:
    """Saved modules in float32, which updates at DPO's rates need; see `copies` for what they compute in."""
    for module in network.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
                if parameter.dtype in HALF:
                    parameter.data = parameter.data.float()
