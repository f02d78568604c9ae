"""Loading the one base: tokenizer, quantization, compute dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from lora_dpo.attention import NAME as BRANCH_ATTENTION
from lora_dpo.batching import Way
from lora_dpo.errors import ModelError
from lora_dpo.model.fused import check_fused_kernels, fuse_kernels
from lora_dpo.probe import Verdict, probe, without_noise
from lora_dpo.recipe import Base

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
    config = load_config(base)
    without_noise(config)
    network = _from_pretrained(
        AutoModelForCausalLM,
        base,
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization_config(base, dtype),
        **({"attn_implementation": BRANCH_ATTENTION} if way == "shared" else {}),
    )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.train()
    never_repack(network)
    if base.fused_kernels:
        fuse_kernels(network)
    return network


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    return _from_pretrained(AutoTokenizer, base)


def load_config(base: Base) -> Any:
    config = _from_pretrained(AutoConfig, base)
    if getattr(config, "quantization_config", None) is not None:
        # Another quantization than the recipe's, or the same twice: neither is what the recipe says.
        raise ModelError(f"base.model {base.model} is already quantized; give the 16-bit original instead")
    return config


def _from_pretrained(auto: Any, base: Base, **arguments: Any) -> Any:
    """`auto.from_pretrained`, with its errors put in terms of the recipe's keys."""
    local = Path(base.model).expanduser()
    if base.model.startswith((".", "/", "~")) and not local.is_dir():
        raise ModelError(f"base.model: there is no folder {base.model}")
    try:
        return auto.from_pretrained(
            str(local) if local.is_dir() else base.model,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with Python code of its own; read that code, then set base.trust_remote_code=true"
            )
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
