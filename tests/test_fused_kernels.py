"""Liger's kernels: refused where they can't run, and never asked for a head or a loss."""

from __future__ import annotations

import pytest
import torch
from builders import build, llama_config, save_small_model

from lora_dpo.errors import ModelError
from lora_dpo.model import fused, load_model
from lora_dpo.recipe import Base


def test_fused_kernels_are_refused_on_the_cpu(tmp_path):
    base = Base(str(save_small_model(tmp_path)), device="cpu", fused_kernels=True)
    with pytest.raises(ModelError, match=r"base\.fused_kernels.*CUDA"):
        load_model(base)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"lora-dpo\[liger\]"):
        fused.check_fused_kernels(torch.device("cuda"))


def test_only_layers_are_fused_never_the_head_or_a_loss(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(fused, "apply_liger_kernel", lambda network, config: asked.append(config))
    fused.fuse_kernels(build(llama_config()))
    (config,) = asked
    assert {name for name, on in config.items() if on} == {"rope", "rms_norm", "swiglu", "geglu"}
    # What isn't named falls back to Liger's defaults, which fuse the head with a loss.
    assert config["fused_linear_cross_entropy"] is False and config["cross_entropy"] is False
