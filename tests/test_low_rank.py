"""The low-rank product that is added in place is peft's, and where it would not be, peft's own is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import (
    build,
    float64_model,
    float64_throughout,
    gradient,
    llama_config,
    random_branches,
    relative,
    with_random_adapter,
)
from test_engine import CONFIGS, examples

from lora_dpo.attention import NAME
from lora_dpo.batching import collate
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import Model, add_adapter, as_reference
from lora_dpo.recipe import Adapter


def peft_forward(model: Model) -> None:
    """Give every layer peft's own forward back."""
    for layer in model.adapter_layers:
        del layer.forward


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_log_probs_and_gradients_are_those_of_pefts_own_layers(name: str):
    """float64, random B; GPT-2's transposed layers with a bias too."""
    with float64_throughout():
        model = float64_model(CONFIGS[name]())
        assert all("forward" in vars(layer) for layer in model.adapter_layers)
        branches = examples(8)
        batch = collate(branches, range(len(branches)))
        ours = token_logprobs(model, batch)
        ours.sum().backward()
        by_ours = gradient(model)
        peft_forward(model)
        theirs = token_logprobs(model, batch)
        theirs.sum().backward()
    assert (ours - theirs).abs().max() < 1e-11
    assert relative(by_ours, gradient(model)) < 1e-11


def test_under_autocast_the_result_is_no_further_from_float32_than_pefts():
    torch.manual_seed(0)
    network = build(llama_config(hidden_size=128)).requires_grad_(False)
    network.set_attn_implementation(NAME)
    model = with_random_adapter(add_adapter(Model(network, None, torch.float32), Adapter(rank=4)))  # pyright: ignore
    branches = examples(9)
    batch = collate(branches, range(len(branches)))
    with torch.no_grad():
        exact = token_logprobs(model, batch)
        model.network.bfloat16()
        for parameter in model.trainable.values():
            parameter.data = parameter.data.float()
        model.compute_dtype = torch.bfloat16
        ours = (token_logprobs(model, batch) - exact).abs().mean()
        peft_forward(model)
        theirs = (token_logprobs(model, batch) - exact).abs().mean()
    assert 0 < ours <= 1.1 * theirs


def test_with_dropout_log_probs_and_gradients_are_those_of_pefts_own_layers():
    """The same inputs are dropped, from the same random numbers."""
    with float64_throughout():
        torch.manual_seed(0)
        network = build(llama_config()).double().requires_grad_(False)
        network.set_attn_implementation(NAME)
        model = Model(network, None, torch.float64)  # pyright: ignore
        model = with_random_adapter(add_adapter(model, Adapter(rank=4, dropout=0.3)))
        branches = examples(8)
        batch = collate(branches, range(len(branches)))
        results = []
        for own in (True, False):
            if not own:
                peft_forward(model)
            torch.manual_seed(5)
            logprobs = token_logprobs(model, batch)
            logprobs.sum().backward()
            results.append((logprobs, gradient(model)))
    (ours, by_ours), (theirs, by_theirs) = results
    assert (ours - theirs).abs().max() < 1e-11
    assert relative(by_ours, by_theirs) < 1e-11


def test_a_merged_layer_adds_nothing_twice():
    """Whoever merges with peft gets peft's behaviour: the product is in the weight, and not added again."""
    model = float64_model(llama_config())
    item = random_branches(np.random.default_rng(0), 5, [6, 4])
    batch = collate([item], [0])
    with torch.no_grad():
        before = token_logprobs(model, batch)
        for layer in model.adapter_layers:
            layer.merge()
        assert (token_logprobs(model, batch) - before).abs().max() < 1e-4
        for layer in model.adapter_layers:
            layer.unmerge()
        with as_reference(model):
            assert (token_logprobs(model, batch) - before).abs().max() > 1e-3
