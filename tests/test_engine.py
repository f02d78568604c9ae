"""Packed, prefix-shared log-probs and gradients are those of one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    float64_model,
    float64_throughout,
    gradient,
    llama_config,
    random_branches,
    relative,
    single_sequence_logprobs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, GPT2Config, MistralConfig, Qwen2Config, Qwen3Config

from lora_dpo import attention
from lora_dpo.batching import collate, pack
from lora_dpo.errors import ModelError
from lora_dpo.logprobs import FrozenHead, Head, LogitTransform, token_logprobs
from lora_dpo.losses import DPO
from lora_dpo.model.offload import OffloadedActivations
from lora_dpo.training.step import step_gradient

SHAPES = [
    (7, (6, 9)),
    (30, (40, 22)),
    (1, (5, 3)),
    (100, (200, 150)),
    (12, (0, 4)),
    (0, (4, 5)),
    (8, (3, 4, 5)[:2]),
]
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "llama": lambda: llama_config(),
    "tied head": lambda: llama_config(tie_word_embeddings=True),
    "qwen2 window": lambda: Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral window": lambda: MistralConfig(**SMALL, sliding_window=11),
    "gemma2 softcap": lambda: Gemma2Config(**SMALL, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}


def examples(seed: int = 0):
    rng = np.random.default_rng(seed)
    return [random_branches(rng, prefix, rests) for prefix, rests in SHAPES]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_branches_equal_one_sequence_at_a_time_in_float64(name: str):
    """Log-probs to 1e-9 and adapter gradients to 1e-8, relative, with a random B."""
    branches = examples()
    weights = torch.tensor([[1.0, -0.7]], dtype=torch.float64)
    with float64_throughout():
        model = float64_model(CONFIGS[name]())
        alone = torch.stack([single_sequence_logprobs(model, item) for item in branches])
        (alone * weights).sum().backward()
        expected = gradient(model)
        packed = torch.zeros_like(alone)
        for batch in pack(branches, 300):
            sums = batch.per_sequence(token_logprobs(model, batch, tile=(50, 40)))
            (sums * weights).sum().backward()
            packed[list(batch.examples)] = sums.detach()
    assert (packed - alone).abs().max() <= 1e-9
    assert relative(gradient(model), expected) <= 1e-8
    assert expected.norm() > 1e-3


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prefix=st.integers(0, 40),
    rests=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    merged=st.booleans(),
)
def test_any_number_of_rests_of_any_length_is_exact(prefix: int, rests: list[int], merged: bool):
    """k sides, empty rests and an empty prefix, alone or merged with a neighbour into one masked block."""
    if prefix + min(rests) < 2:
        return
    rng = np.random.default_rng(prefix)
    item, other = random_branches(rng, prefix, rests), random_branches(rng, 5, [3] * len(rests))
    with float64_throughout(), torch.no_grad():
        model = float64_model(llama_config(num_hidden_layers=1))
        batch = collate([item, other] if merged else [item], range(2 if merged else 1))
        packed = batch.per_sequence(token_logprobs(model, batch))[0]
        alone = single_sequence_logprobs(model, item)
    assert (packed - alone).abs().max() <= 1e-9


def test_the_gradient_of_a_step_does_not_depend_on_the_token_budget():
    """Five budgets, float32, random B: gradients equal to 1e-5 relative."""
    branches = examples(1)
    model = float64_model(llama_config())
    model.network.float()
    model.compute_dtype = torch.float32
    gradients = []
    for budget in (1, 64, 200, 500, 10_000):
        sums = step_gradient(model, DPO(), branches, tokens_per_microbatch=budget, seed=0)
        assert sums.examples == len(branches)
        gradients.append(gradient(model))
    for other in gradients[1:]:
        assert relative(other, gradients[0]) <= 1e-5


@pytest.mark.parametrize("tile", [None, (1, 97), (1000, 1), (7, 13)])
def test_the_frozen_head_gives_the_same_gradient_as_a_trainable_one(tile: tuple[int, int] | None):
    """The gradient finished in forward against autograd's own, with a softcap and a bias-free tied head,
    whatever tiles the logits are made by.
    """
    branches = examples(2)
    with float64_throughout():
        model = float64_model(CONFIGS["gemma2 softcap"]())
        batch = collate(branches, range(len(branches)))
        token_logprobs(model, batch, tile=tile).sum().backward()
        finished = gradient(model)
        model.head.weight.requires_grad_(True)
        token_logprobs(model, batch).sum().backward()
    assert relative(finished, gradient(model)) <= 1e-12
    assert model.head.weight.grad is not None and model.head.weight.grad.norm() > 0


def test_a_nearly_certain_token_keeps_the_digits_of_its_gradient():
    """In bfloat16, where 1 − p is far below its step of 2⁻⁸ at 1: within 1% of float64 on the same logits."""
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 16).bfloat16(), torch.randn(40)
    targets = torch.randint(0, 40, (30,))
    hidden = (1.5 * weight[targets]).requires_grad_()
    probabilities = torch.softmax((hidden.detach() @ weight.t()).double() + bias.double(), dim=-1)
    others = probabilities.scatter(1, targets[:, None], 0.0)
    uncertain = others.sum(dim=1, keepdim=True)
    expected = uncertain * weight[targets] - others @ weight.double()
    head = Head(weight, bias, LogitTransform(), rows=8, columns=11)
    FrozenHead.apply(hidden, targets, head)[0].sum().backward()  # pyright: ignore[reportOptionalSubscript]
    assert uncertain.median() < 1e-4
    assert hidden.grad is not None
    errors = (hidden.grad - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 0.01


def test_out_of_memory_halves_the_budget_and_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch):
    from lora_dpo.training import step as module

    branches = examples(3)
    model = float64_model(llama_config())
    whole = step_gradient(model, DPO(), branches, tokens_per_microbatch=10_000, seed=0)
    expected, genuine, failures = gradient(model), module.batch_logprobs, []

    def failing(model, objective, batch, cache=None, **more):
        if batch.tokens > 500:
            failures.append(batch.tokens)
            raise torch.OutOfMemoryError("simulated")
        return genuine(model, objective, batch)

    monkeypatch.setattr(module, "batch_logprobs", failing)
    sums = step_gradient(model, DPO(), branches, tokens_per_microbatch=10_000, seed=0)
    assert failures and sums.tokens_per_microbatch < 10_000 == whole.tokens_per_microbatch
    assert relative(gradient(model), expected) <= 1e-6


def test_a_layout_must_be_given():
    model = float64_model(llama_config())
    with pytest.raises(ValueError, match="branch_layout"):
        model.causal(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False, softcap=0.0):
    """Variable-length attention by its definition: [T, H, d], causal from the bottom right, left window."""
    out = torch.empty_like(q)
    for n in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        qs, ks, vs = q[rows], k[keys], v[keys]
        assert len(qs) <= max_q and len(ks) <= max_k
        if enable_gqa:
            ks, vs = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (ks, vs))
        at = torch.arange(len(qs))[:, None] + len(ks) - len(qs)
        distance = at - torch.arange(len(ks))[None]
        seen = (distance >= -window_size[1]) & ((window_size[0] < 0) | (distance <= window_size[0]))
        logits = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        out[rows] = torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), vs)
    return out


def plain_flash_attn(q, k, v, *rest, causal, softmax_scale, window_size, softcap):
    """The same as flash-attn names it; it takes grouped heads by itself."""
    assert causal
    options = {"scale": softmax_scale, "window_size": window_size, "softcap": softcap}
    return plain_varlen(q, k, v, *rest, enable_gqa=True, **options)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(
    "kernel", ["torch", "torch without enable_gqa", "flash-attn", "flash-attn softcapped"]
)
def test_the_variable_length_call_gives_what_the_blocks_give(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kernel: str
):
    """The CUDA path's arguments, with the call itself replaced by its definition; no kernel is tested."""
    names = frozenset({"scale", "window_size"} | ({"enable_gqa"} if kernel == "torch" else set()))
    ours = (plain_varlen, names) if kernel.startswith("torch") else None
    monkeypatch.setattr(attention, "_torch_varlen", lambda: ours)
    monkeypatch.setattr(attention, "_flash_attn", lambda: plain_flash_attn)
    attend = attention.flash_call.__wrapped__("softcapped" in kernel)
    assert attend is not None
    softcap = 0.5 if "softcapped" in kernel else None
    layout = collate(examples(4), range(len(SHAPES))).layout
    generator = torch.Generator().manual_seed(0)
    tokens = len(layout.example)
    query = torch.randn(1, 4, tokens, 16, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(1, 2, tokens, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    flash = attention._flash(attend, query, key, value, layout, 0.3, window, softcap)
    options = {"scaling": 0.3, "branch_layout": layout, "sliding_window": window, "softcap": softcap}
    blocks, _ = attention.branch_attention(torch.nn.Module(), query, key, value, None, **options)
    assert flash.shape == blocks.shape == (1, tokens, 4, 16)
    assert (flash - blocks).abs().max() < 1e-12


def test_a_softcap_is_never_given_to_a_kernel_that_does_not_know_it(monkeypatch: pytest.MonkeyPatch):
    """torch's call has no softcap and flash-attn before 2.6 neither: then there is no flash call."""
    monkeypatch.setattr(attention, "_torch_varlen", lambda: (plain_varlen, frozenset()))
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    assert attention.flash_call.__wrapped__(True) is None
    assert attention.flash_call.__wrapped__(False) is not None


def gradient_under(checkpointing: str, saving: Callable[[], Any] | None = None) -> torch.Tensor:
    """The adapters' gradient with this level; on the CPU offloading stays off unless it is forced."""
    branches = examples(6)
    model = float64_model(llama_config(num_hidden_layers=4))
    if checkpointing != "none":
        model.checkpoint_layers(offload=checkpointing == "offload")
    if saving is not None:
        model.saving = saving
    batch = collate(branches, range(len(branches)))
    token_logprobs(model, batch).sum().backward()
    return gradient(model)


def test_every_checkpointing_level_gives_the_same_gradient_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    """Under offload each layer's input, and little else, waits on the host, and nothing stays there."""
    packed: list[tuple[int, ...]] = []
    pack_one = OffloadedActivations._pack

    def counting(self: OffloadedActivations, tensor: torch.Tensor) -> torch.Tensor | int:
        packed.append(tuple(tensor.shape))
        return pack_one(self, tensor)

    monkeypatch.setattr(OffloadedActivations, "_pack", counting)
    expected = gradient_under("none")
    assert torch.equal(gradient_under("layers"), expected)
    assert torch.equal(gradient_under("offload"), expected)
    assert packed == [], "on the CPU there is nowhere else to go"
    activations = OffloadedActivations(None, smallest=1)
    assert torch.equal(gradient_under("offload", activations.saving), expected)
    inputs = (1, sum(item.tokens for item in examples(6)), 64)
    assert packed.count(inputs) >= 4 and len(activations._kept) <= 8, "four layers' inputs and the last norm"
    assert all(item is None for item in activations._kept)


def test_a_model_that_cannot_recompute_its_layers_says_so():
    model = float64_model(llama_config())
    model.causal.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="gradient_checkpointing=none"):
        model.checkpoint_layers()


class Readings(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read back, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name.startswith(self.WAITS):
            self.seen.append(name)
        return func(*args, **kwargs or {})


def test_a_step_reads_nothing_back_from_the_device():
    """Whatever the number of micro-batches: sums stay tensors until the step is done."""
    model = float64_model(llama_config())
    with Readings() as readings:
        sums = step_gradient(model, DPO(), examples(7), tokens_per_microbatch=100, seed=0)
        assert readings.seen == []
        assert sums.loss.item() > 0
    assert readings.seen == ["_local_scalar_dense"]
