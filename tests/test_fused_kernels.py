"""Liger's kernels: refused where they can't run, and never asked for a head or a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import build, llama_config, save_small_model
from transformers.models.llama import modeling_llama

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


def test_no_other_model_of_the_process_meets_a_fused_class_or_a_fused_rope_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
):
    """Liger rebinds names in the architecture's module; a CPU model of the same kind must not notice."""
    norm, rope = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    calls = []

    def rebind(network: object, config: object) -> None:
        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", torch.nn.Identity)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *_: calls.append("fused"))

    monkeypatch.setattr(fused, "apply_liger_kernel", rebind)
    network = build(llama_config())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = network(ids).logits
        fused.fuse_kernels(network)
        assert modeling_llama.LlamaRMSNorm is norm and modeling_llama.apply_rotary_pos_emb is not rope
        assert torch.equal(network(ids).logits, before)
    assert calls == []
    on_card: Any = type("OnCard", (), {"is_cuda": True})()
    modeling_llama.apply_rotary_pos_emb(on_card, on_card, on_card, on_card)
    assert calls == ["fused"]
