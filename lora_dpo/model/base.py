"""Loading the one base: tokenizer, quantization, compute dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as hf_logging

from lora_dpo.attention import NAME as BRANCH_ATTENTION
from lora_dpo.batching import Way
from lora_dpo.errors import ModelError
from lora_dpo.model.fused import check_fused_kernels, fuse_kernels
from lora_dpo.model.trust import check_folder, check_size, check_weights, without_hints
from lora_dpo.probe import Verdict, probe, without_noise
from lora_dpo.recipe import Base

QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)

if not sys.stderr.isatty():
    hf_logging.disable_progress_bar()  # in a log file its redrawn bars are noise


def verdict_on(base: Base) -> Verdict:
    """The way that micro-batches run through this base, by a probe of its architecture."""
    config = load_config(base)
    options: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    if getattr(config, "auto_map", None) and base.revision:
        options["code_revision"] = base.revision  # the code that was read, not the newest
    return probe(config, **options)


def load_base(base: Base, way: Way = "shared") -> PreTrainedModel:
    """The frozen base in memory, quantized as asked, in train mode for ever, with no dropout and no
    gradients, and with the attention that `way` relies on.

    Raises ModelError where it cannot be had.
    """
    device = pick_device(base)
    if base.fused_kernels:
        check_fused_kernels(device)
    dtype = pick_compute_dtype(base, device)
    config = _read_config(base)
    without_noise(config)
    stored = _stored_quantization(config)
    _check_loadable(base, config)
    if stored is not None:
        # What it computes in is the recipe's; so is the threshold (see `quantization_config`).
        name = str(dtype).removeprefix("torch.")
        config.quantization_config = {**stored, "bnb_4bit_compute_dtype": name, "llm_int8_threshold": 0.0}
    network, loaded = _from_pretrained(
        AutoModelForCausalLM,
        base,
        use_safetensors=True,
        output_loading_info=True,
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=None if stored is not None else quantization_config(base, dtype),
        **({"attn_implementation": BRANCH_ATTENTION} if way == "shared" else {}),
    )
    _check_complete(base, loaded)
    if stored is not None:
        _compute_in(network, dtype)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.train()
    never_repack(network)
    if base.fused_kernels:
        fuse_kernels(network)
    return network


def _check_loadable(base: Base, config: Any) -> None:
    """Raise ModelError before memory is taken for weights that can't be had."""
    local = _local(base)
    if local is None:
        # Given an adapter, transformers would take the base that it names instead.
        if _call(base, lambda: find_adapter_config_file(base.model, revision=base.revision)) is not None:
            raise ModelError(
                f"base.model {base.model} is an adapter, or holds one: give the model under it as base.model"
            )
        return
    check_weights(local)
    _call(base, lambda: check_size(config, local, trust_remote_code=base.trust_remote_code))


def _check_complete(base: Base, loaded: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that the files lack: they were made up at random."""
    missing = sorted(map(str, loaded.get("missing_keys", ())))
    if missing:
        raise ModelError(
            f"base.model {base.model} cannot be loaded: its weights lack {missing[0]}, and"
            f" {len(missing) - 1} others"
        )


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    return _from_pretrained(AutoTokenizer, base)


def load_config(base: Base) -> Any:
    """The architecture, without what a checkpoint says of its quantization.

    Raises ModelError where it is quantized otherwise than the recipe says.
    """
    config = _read_config(base)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def architecture_of(base: Base) -> str | None:
    """The class that the base is loaded as; None where transformers knows none. Raises ModelError."""
    config = load_config(base)
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if base.trust_remote_code and isinstance(own, str):
        return own.rpartition(".")[2]
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found.__name__ if isinstance(found, type) else None


def _read_config(base: Base) -> Any:
    config = _from_pretrained(AutoConfig, base)
    without_hints(config)
    stored = _stored_quantization(config)
    if stored is not None:
        check_stored(base, stored)
    return config


def stored_quantization(base: Base) -> dict[str, Any] | None:
    """What a base's checkpoint says of its own quantization; None for one that isn't quantized."""
    return _stored_quantization(_read_config(base))


def _stored_quantization(config: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its own quantization."""
    found = getattr(config, "quantization_config", None)
    found = getattr(config.get_text_config(), "quantization_config", None) if found is None else found
    if found is None or isinstance(found, dict):
        return found
    return found.to_dict() if hasattr(found, "to_dict") else {"quant_method": str(found)[:80]}


def check_stored(base: Base, stored: Mapping[str, Any]) -> None:
    """Raise ModelError where a quantized checkpoint isn't bitsandbytes', or isn't what the recipe says."""
    bits = 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else 0
    method = str(stored.get("quant_method") or ("bitsandbytes" if bits else "an unknown method"))
    if method != "bitsandbytes" or not bits:
        raise ModelError(
            f"base.model {base.model} is quantized with {method}, which is not trained on here: give a 16-bit"
            " copy of it (base.quantization quantizes that while it loads), or one quantized by bitsandbytes"
        )
    kind = stored.get("bnb_4bit_quant_type", "fp4") if bits == 4 else "int8"
    double = bool(stored.get("bnb_4bit_use_double_quant", False))
    if base.quantization != kind:
        raise ModelError(
            f"base.model {base.model} is stored as {kind}, which stays as it is: set base.quantization={kind}"
            f" (it is {base.quantization}), or give a 16-bit copy of it"
        )
    if bits == 4 and base.double_quantization != double:
        raise ModelError(
            f"base.model {base.model} is stored {'with' if double else 'without'} double quantization: set"
            f" base.double_quantization={str(double).lower()}, or give a 16-bit copy of it"
        )


def _compute_in(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what a quantized checkpoint keeps unquantized the recipe's dtype, and the rest that one's output.

    transformers leaves both as they were saved. The quantized bytes stay.
    """
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (isinstance(module, QUANTIZED) and name == "weight"):
                state = getattr(parameter, "quant_state", None)
                if state is not None:
                    state.dtype = dtype
            elif parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def unquantized_bytes(network: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights that a quantized base keeps unquantized, by what they are; the largest first.

    Nothing for a base of which nothing is quantized, and norms, biases and the like are left out.
    """
    plain = [module for module in network.modules() if not isinstance(module, QUANTIZED)]
    if len(plain) == len(list(network.modules())):
        return {}
    found: dict[int, tuple[str, int]] = {}
    for module in plain:
        for weight in (p for p in module._parameters.values() if p is not None and p.ndim > 1):
            kind = _what(module, weight, network)
            if found.get(id(weight), (kind,))[0] != kind:
                kind = "embeddings and head, which are one"
            found[id(weight)] = (kind, weight.nbytes)
    sizes: dict[str, int] = {}
    for kind, size in found.values():
        sizes[kind] = sizes.get(kind, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _what(module: nn.Module, weight: Tensor, network: PreTrainedModel) -> str:
    if module is network.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d))
    return "experts" if weight.ndim > 2 and not convolution else "other weights"


def _from_pretrained(auto: Any, base: Base, **arguments: Any) -> Any:
    """`auto.from_pretrained`, with its errors put in terms of the recipe's keys."""
    local = _local(base)
    if local is not None:
        check_folder(local)
    place = base.model if local is None else str(local)
    return _call(
        base,
        lambda: auto.from_pretrained(
            place, revision=base.revision, trust_remote_code=base.trust_remote_code, **arguments
        ),
    )


def _local(base: Base) -> Path | None:
    """The base's folder, None for a hub id. Raises ModelError for a folder that isn't there."""
    try:
        local = Path(base.model).expanduser()
        is_there = local.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name that can't be a path at all
        raise ModelError(f"base.model got {base.model!r:.80}: {error}") from error
    if base.model.startswith((".", "/", "~")) and not is_there:
        raise ModelError(f"base.model: there is no folder {base.model}")
    if is_there and base.revision is not None:
        raise ModelError(f"base.revision got {base.revision!r}; a local folder, {base.model}, has none")
    return local if is_there else None


def _call(base: Base, load: Callable[[], Any]) -> Any:
    """What `load` gives. Whatever transformers raises over somebody else's files becomes a ModelError."""
    try:
        return load()
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with Python code of its own; read that code, then set base.trust_remote_code=true"
            )
        elif not isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ModelError(f"base.model {base.model} cannot be loaded: {reason}") from error


def pick_device(base: Base) -> torch.device:
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("base.device is cuda, but torch finds no CUDA device; use base.device=cpu or auto")
    cuda = base.device == "cuda" or (base.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def pick_compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it; else float16 on CUDA (RTX 20, T4), and float32 on the CPU."""
    if base.compute_dtype != "auto":
        return getattr(torch, base.compute_dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    onednn = torch.backends.mkldnn.is_available()
    return torch.bfloat16 if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def quantization_config(base: Base, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if base.quantization == "none":
        return None
    if base.quantization == "int8":
        # With an outlier threshold, columns are picked over the whole batch: neighbours would change a
        # pair's log-probs.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def never_repack(network: torch.nn.Module) -> None:
    """Switch off bitsandbytes' re-packing of 4-bit weights, in place, at the first forward in eval mode.

    On CPUs with AVX512-BF16 it changes the base's bytes and runs a kernel without autograd from then on.
    """
    for module in network.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
