"""The base alone again after adapters, and trained on as it lies in memory, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from builders import build, small_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from lora_dpo.errors import ModelError
from lora_dpo.model import Model, bare, load_adapter, load_model
from lora_dpo.recipe import Adapter, Base, Recipe, Reference, pinned
from lora_dpo.reference import base_fingerprint
from lora_dpo.training import train

KINDS = {
    "LoRA": Adapter(rank=4),
    "DoRA": Adapter(rank=4, dora=True),
    "PiSSA": Adapter(rank=4, init="pissa"),
    "trained tokens": Adapter(rank=4, trained_tokens=(5, 7)),
    "whole modules": Adapter(rank=4, modules_to_save=("norm",)),
}


def logits(model: Model) -> Tensor:
    with torch.no_grad(), model.autocast():
        return model.causal(
            torch.arange(12)[None] + 3, attention_mask=torch.ones(1, 12, dtype=torch.int64)
        ).logits


def own_attention(model: Model) -> Model:
    model.causal.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_whose_adapters_were_taken_off_is_the_base(small_model: Path, quantization, kind):
    base = Base(str(small_model), compute_dtype="float32", quantization=quantization)
    model = load_model(base)
    fingerprint, names = base_fingerprint(model), [name for name, _ in model.network.named_modules()]
    weights = {name: parameter.data_ptr() for name, parameter in model.network.named_parameters()}
    alone = logits(own_attention(model))
    adapted = load_model(base, KINDS[kind], reference=Reference(sync_every=3), on=bare(model))
    with torch.no_grad():
        for parameter in adapted.trainable.values():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(logits(own_attention(adapted)), alone)
    again = bare(adapted)
    assert [name for name, _ in again.network.named_modules()] == names
    assert {name: p.data_ptr() for name, p in again.network.named_parameters()} == weights
    assert not again.trainable and base_fingerprint(again) == fingerprint
    assert torch.equal(logits(own_attention(again)), alone)


def test_a_score_head_goes_with_its_adapter(small_model: Path):
    base = Base(str(small_model), compute_dtype="float32")
    model = load_model(base)
    names, fingerprint = [name for name, _ in model.network.named_modules()], base_fingerprint(model)
    again = bare(load_model(base, Adapter(rank=4), reference=None, rewards=True, on=model))
    assert [name for name, _ in again.network.named_modules()] == names
    assert base_fingerprint(again) == fingerprint


def test_a_run_on_the_base_in_memory_ends_with_the_adapter_of_a_run_that_loaded_its_own(recipe: Recipe):
    recipe = pinned(recipe)
    own = train(dataclasses.replace(recipe, run_directory=recipe.run_directory + "-own"), quiet=True)
    model = load_model(recipe.base)
    for again in ("a", "b"):
        here = dataclasses.replace(recipe, run_directory=recipe.run_directory + again)
        run = train(here, quiet=True, on=model)
        assert not model.trainable
        for name, tensor in load_file(own.adapter_folder / "adapter_model.safetensors").items():
            other = load_file(run.adapter_folder / "adapter_model.safetensors")[name]
            assert torch.equal(tensor, other), name


def test_a_base_in_memory_that_is_another_one_or_not_alone_is_refused(recipe: Recipe, tmp_path: Path):
    recipe = pinned(recipe)
    run = train(recipe, quiet=True)
    model = load_model(recipe.base)
    with pytest.raises(ModelError, match="was loaded from"):
        load_model(dataclasses.replace(recipe.base, quantization="none"), on=model)
    adapted = load_adapter(model, str(run.adapter_folder))
    with pytest.raises(ModelError, match="take them off first"):
        load_model(recipe.base, on=adapted)
    load_model(recipe.base, on=bare(adapted))


def test_experts_are_taken_off_too(tmp_path: Path):
    tokenizer = small_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    build(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = Base(str(tmp_path), compute_dtype="float32")
    model = load_model(base)
    alone, fingerprint = logits(own_attention(model)), base_fingerprint(model)
    adapter = Adapter(rank=2, targets=("q_proj",), expert_targets=("mlp.experts.gate_up_proj",))
    adapted = load_model(base, adapter, on=bare(model))
    again = bare(adapted)
    assert base_fingerprint(again) == fingerprint
    assert torch.equal(logits(own_attention(again)), alone)
