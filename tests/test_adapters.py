"""Every kind of adapter starts as exactly nothing, trains all that it should and nothing else, and is itself
again when it was saved; what would break that is refused in words.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from builders import (
    build,
    float64_throughout,
    gradient,
    llama_config,
    pair_rows,
    random_branches,
    relative,
    save_small_model,
    single_sequence_logprobs,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig
from whole_merge import merged_network, merged_tensors, merged_weight

from lora_dpo.attention import NAME
from lora_dpo.batching import MicroBatch, collate
from lora_dpo.errors import ModelError, RecipeError, RunError
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.finished import evaluate_run, open_finished
from lora_dpo.logprobs import token_logprobs
from lora_dpo.losses import DPO
from lora_dpo.model import (
    REFERENCE,
    Model,
    add_adapter,
    load_adapter,
    load_base,
    load_model,
    save_adapter,
    save_for_resuming,
    sync_reference,
    without_dropout,
)
from lora_dpo.model.initial import starting_factors
from lora_dpo.model.low_rank import _AddLowRank, factors_of_difference
from lora_dpo.model.targets import layer_numbers
from lora_dpo.recipe import (
    Adapter,
    Base,
    Data,
    Recipe,
    Reference,
    Training,
    from_dict,
    override,
    to_dict,
    to_yaml,
)
from lora_dpo.reference import reference_logprobs
from lora_dpo.reference.identity import base_fingerprint
from lora_dpo.training import Record, preflight, step_gradient, train
from lora_dpo.training.checkpoint import restore_adapter
from lora_dpo.training.eva import _Directions, start_from_data
from lora_dpo.training.optimizer import learning_rate, make_optimizer, set_learning_rate

TOKENS = (17, 40)
"""Tokens that are trained in the tests; `branches` puts them into every prefix."""

KINDS = {
    "default": {},
    "gaussian": {"init": "gaussian"},
    "eva": {"init": "eva"},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora-gaussian-rslora": {"dora": True, "init": "gaussian", "rslora": True},
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "rslora": True},
    "olora": {"init": "olora"},
    "olora-ranks": {"init": "olora", "ranks": {"q_proj": 2}, "alphas": {"layers.0.mlp.up_proj": 4}},
    "ranks": {"ranks": {"q_proj": 2, r"layers\.1\..*": 8}, "alphas": {"v_proj": 3}},
    "layers": {"layers": "1:"},
    "head": {"targets": ("q_proj", "lm_head")},
    "tokens": {"trained_tokens": TOKENS},
    "saved-head": {"modules_to_save": ("lm_head",)},
    "saved-embeddings-and-norms": {"modules_to_save": ("embed_tokens", "input_layernorm", "norm")},
    "pissa-tokens-head": {"init": "pissa", "trained_tokens": TOKENS, "modules_to_save": ("lm_head",)},
    "dora-tokens": {"dora": True, "trained_tokens": TOKENS},
}
BASES = {"nf4-bfloat16": ("nf4", "bfloat16"), "float32": ("none", "float32")}

kinds = pytest.mark.parametrize("kind", KINDS)
bases = pytest.mark.parametrize("base", BASES)


def kind_of(kind: str, **more) -> Adapter:
    return Adapter(**{"rank": 4, **KINDS[kind], **more})  # pyright: ignore[reportArgumentType]


def base_of(folder: Path, base: str) -> Base:
    quantization, dtype = BASES[base]
    return Base(str(folder), quantization=quantization, compute_dtype=dtype)  # pyright: ignore


def branches(count: int = 5):
    rng = np.random.default_rng(0)
    items = [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(count)]
    for item in items:
        item.prefix[2:4] = TOKENS
    return items


def batch() -> MicroBatch:
    items = branches()
    return collate(items, range(len(items)))


def policy(model: Model) -> Tensor:
    with torch.no_grad(), without_dropout(model):
        return token_logprobs(model, batch())


def stir(model: Model, scale: float = 0.02) -> None:
    """Move every trained value: a fresh B is 0, which hides the gradients of A."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable.values():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def steps(model: Model, count: int, rate: float = 1e-2) -> None:
    optimizer = make_optimizer(Training(learning_rate=rate), model.trainable)
    items = branches()
    for _ in range(count):
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        optimizer.step()
        optimizer.zero_grad()


@bases
@kinds
def test_an_untrained_policy_is_its_reference_to_the_bit(small_model: Path, kind: str, base: str):
    """Every log-ratio is exactly 0 and the loss exactly ln 2: DoRA, PiSSA and OLoRA in bfloat16 too."""
    model = load_model(base_of(small_model, base), kind_of(kind))
    logprobs = batch_logprobs(model, DPO(), batch())
    assert torch.equal(logprobs.log_ratio, torch.zeros_like(logprobs.log_ratio))
    loss = DPO()(logprobs).per_example
    assert torch.equal(loss, torch.full_like(loss, math.log(2.0)))


@bases
@kinds
def test_every_trained_tensor_is_float32_and_gets_a_gradient(small_model: Path, kind: str, base: str):
    model = load_model(base_of(small_model, base), kind_of(kind))
    stir(model)
    items = branches()
    step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
    for name, parameter in model.network.named_parameters():
        assert (name in model.trainable) == (parameter.grad is not None), name
        if parameter.grad is not None:
            assert parameter.dtype == torch.float32
            assert parameter.grad.any(), name


@bases
@kinds
def test_training_leaves_the_reference_and_a_saved_adapter_is_itself_again(
    small_model: Path, tmp_path: Path, kind: str, base: str
):
    """After 20 steps the reference's log-probs and the base's bytes are what they were; exported and loaded,
    and restored from a checkpoint onto another fresh adapter, the policy's log-probs are the same, to the
    bit.
    """
    model = load_model(base_of(small_model, base), kind_of(kind))
    reference, fingerprint = reference_logprobs(model, batch()), base_fingerprint(model)
    steps(model, 20)
    assert torch.equal(reference_logprobs(model, batch()), reference)
    assert base_fingerprint(model) == fingerprint
    trained = policy(model)
    assert (trained - reference).abs().max() > 1e-3, "the adapter learned nothing, so nothing was tested"
    save_adapter(model, tmp_path / "exported")
    loaded = load_adapter(load_model(base_of(small_model, base)), str(tmp_path / "exported"))
    assert torch.equal(policy(loaded), trained)
    save_for_resuming(model, tmp_path / "checkpoint")
    other = load_model(base_of(small_model, base), kind_of(kind), seed=1)
    restore_adapter(tmp_path / "checkpoint", other)
    assert torch.equal(policy(other), trained)
    assert torch.equal(reference_logprobs(other, batch()), reference)


@pytest.mark.parametrize("kind", ["default", "dora", "pissa", "olora-ranks", "tokens", "saved-head"])
def test_log_probs_and_gradients_are_those_of_single_sequences_through_the_model(kind: str):
    """In float64, with random values: our packed forward against autograd through peft's own layers."""
    torch.manual_seed(0)
    with float64_throughout():
        network = build(llama_config()).double().requires_grad_(False)
        network.set_attn_implementation(NAME)
        model = add_adapter(Model(network, None, torch.float64), kind_of(kind))  # pyright: ignore
        for parameter in network.parameters():
            parameter.data = parameter.data.double()
        stir(model, 0.1)
        item = branches(1)[0]
        token_logprobs(model, collate([item], [0])).sum().backward()
        ours = gradient(model)
        for layer in model.adapter_layers:
            vars(layer).pop("forward", None)
        sums = single_sequence_logprobs(model, item)
        sums.sum().backward()
        theirs = gradient(model)
    assert relative(ours, theirs) < 1e-10


@kinds
def test_dropout_is_off_at_evaluation_and_nothing_at_the_start(small_model: Path, kind: str):
    """An untrained policy is its reference with dropout on too: what is dropped is multiplied by nothing."""
    model = load_model(base_of(small_model, "float32"), kind_of(kind, dropout=0.3))
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(token_logprobs(model, batch()), reference_logprobs(model, batch()))
        stir(model, 0.1)
        assert torch.equal(policy(model), policy(model))
        assert not torch.equal(token_logprobs(model, batch()), policy(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("pissa", 8), ("olora", 8), ("pissa-rslora", 8), ("olora-ranks", 8), ("dora", 4), ("saved-head", 4)],
)
def test_an_exported_adapter_loads_in_plain_peft(small_model: Path, tmp_path: Path, kind: str, rank: int):
    """One whose start is subtracted has twice the rank; the logits are those that it had here."""
    base = base_of(small_model, "float32")
    model = load_model(base, kind_of(kind))
    steps(model, 4)
    save_adapter(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32)
    start = plain(torch.arange(40)[None]).logits.detach()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    layer: Any = loaded.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer.r["default"] == rank
    model.causal.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours = model.causal(torch.arange(40)[None], use_cache=False).logits
        theirs = loaded(torch.arange(40)[None]).logits
    assert (ours - theirs).abs().max() < 1e-4 < 1e-2 < (ours - start).abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", ["dora", "pissa", "olora"])
def test_a_merged_weight_is_what_the_layer_computes(small_model: Path, kind: str, quantization: str):
    base = Base(str(small_model), quantization=quantization, compute_dtype="float32")  # pyright: ignore
    model = load_model(base, kind_of(kind))
    stir(model)
    for layer in model.adapter_layers:
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = layer(x)
            made = x @ merged_weight(layer).float().T
        # int8 also rounds its input, by 1/254 of the largest at most.
        assert relative(made, expected) < (0.03 if quantization == "int8" else 1e-5)


@pytest.mark.parametrize(
    "kind", ["dora", "pissa", "tokens", "saved-head", "saved-embeddings-and-norms", "pissa-tokens-head"]
)
def test_the_merged_model_behaves_as_base_and_adapter(small_model: Path, tmp_path: Path, kind: str):
    base = base_of(small_model, "float32")
    model = load_model(base, kind_of(kind))
    steps(model, 4)
    merged_network(model, base, torch.float32).save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    model.causal.set_attn_implementation("sdpa")
    ids = torch.from_numpy(branches(1)[0].side(0)).long()[None]
    with torch.no_grad():
        expected = model.causal(ids, use_cache=False).logits
        assert (merged(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_trained_tokens_of_tied_embeddings_stay_tied(tmp_path: Path):
    folder = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    base = base_of(folder, "float32")
    model = load_model(base, Adapter(rank=4, trained_tokens=TOKENS))
    reference = reference_logprobs(model, batch())
    assert torch.equal(policy(model), reference)
    steps(model, 4)
    assert torch.equal(reference_logprobs(model, batch()), reference)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_model(base), str(tmp_path / "adapter"))
    assert torch.equal(policy(loaded), policy(model))
    merged = merged_network(model, base, torch.float32)
    embeddings: Any = merged.get_parameter("model.embed_tokens.weight")
    assert embeddings is merged.get_parameter("lm_head.weight")
    original = load_base(base).get_parameter("model.embed_tokens.weight")
    changed = (embeddings != original).any(dim=1).nonzero()[:, 0]
    assert tuple(changed.tolist()) == TOKENS


def test_the_principal_directions_are_the_best_low_rank_approximation():
    """Eckart & Young: what is left over has the norm of the singular values that were left out."""
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    b, a = starting_factors(weight, 5, "pissa", 2.0)
    left = torch.linalg.svdvals(weight)[5:].square().sum().sqrt()
    assert (weight - 2 * b @ a).norm() == pytest.approx(left.item(), rel=1e-5)
    # B and A share each singular value evenly.
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-5)


def test_the_olora_start_is_orthonormal_and_triangular():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    b, a = starting_factors(weight, 5, "olora", 2.0)
    assert torch.allclose(b.T @ b, torch.eye(5), atol=1e-5)
    assert torch.equal(a, a.triu())
    b, a = starting_factors(weight, 20, "olora", 2.0)
    assert torch.allclose(b @ a, weight, atol=1e-5)


def test_a_wide_weight_is_approximated_by_subspace_iterations():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(1100, 6, generator=generator) @ torch.randn(6, 1050, generator=generator)
    torch.manual_seed(0)
    b, a = starting_factors(low + 0.01 * torch.randn(low.shape, generator=generator), 6, "pissa", 1.0)
    assert relative(b @ a, low) < 1e-3


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 4), (True, 32 / 2)])
def test_rslora_scales_by_alpha_over_the_root_of_the_rank(small_model: Path, rslora: bool, scaling: float):
    model = load_model(base_of(small_model, "float32"), Adapter(rank=4, alpha=32, rslora=rslora))
    assert {layer.scaling["default"] for layer in model.adapter_layers} == {scaling}


def test_ranks_and_alphas_apply_to_the_modules_that_they_name(small_model: Path):
    adapter = Adapter(
        rank=4, alpha=8, ranks={"q_proj": 2, "layers.0.mlp.up_proj": 6}, alphas={"q_proj": 10}, init="pissa"
    )
    model = load_model(base_of(small_model, "nf4-bfloat16"), adapter)
    layer: Any
    for path, layer in model.causal.named_modules():
        if layer in model.adapter_layers:
            name = path.removeprefix("model.")
            rank = 2 if "q_proj" in name else 6 if name == "layers.0.mlp.up_proj" else 4
            alpha = 10 if "q_proj" in name else 8
            assert layer.lora_A["default"].weight.shape == (rank, layer.in_features)
            assert layer.scaling["default"] == alpha / rank == -layer.scaling["initial"]


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (Adapter(layers="1:"), {1: 7}),
        (Adapter(layers="0", targets=("q_proj", "up_proj")), {0: 2}),
        (Adapter(layers=":-1"), {0: 7}),
        (Adapter(targets=("layers.0.self_attn.q_proj", "v_proj")), {0: 2, 1: 1}),
    ],
)
def test_layers_and_targets_choose_modules(small_model: Path, adapter: Adapter, expected: dict[int, int]):
    model = load_model(base_of(small_model, "nf4-bfloat16"), adapter)
    found: dict[int, int] = {}
    for path, layer in model.causal.named_modules():
        if layer in model.adapter_layers:
            number = int(path.split(".")[2])
            found[number] = found.get(number, 0) + 1
    assert found == expected


def test_layer_ranges_are_half_open_as_pythons_are():
    assert layer_numbers("0:8", 32) == list(range(8))
    assert layer_numbers("-4:", 32) == [28, 29, 30, 31]
    assert layer_numbers("0,1,30:", 32) == [0, 1, 30, 31]
    assert layer_numbers("-1", 32) == [31]
    for wrong in ("32", "-33", "30:40", "5:5"):
        with pytest.raises(ModelError, match=r"adapter\.layers got .*32 layers"):
            layer_numbers(wrong, 32)


def test_token_texts_are_looked_up(small_model: Path):
    model = load_model(base_of(small_model, "float32"), Adapter(trained_tokens=("<|im_end|>", 5)))
    (delta,) = [p for name, p in model.trainable.items() if "trainable_tokens" in name]
    embeddings: Any = model.causal.get_input_embeddings()
    assert torch.equal(delta, embeddings.original_module.weight[[2, 5]])


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_lora_plus_gives_b_its_share_of_the_rate_all_along_the_schedule(
    small_model: Path, ratio: float, kind: str
):
    training = Training(learning_rate=1e-4, warmup=0.5, optimizer=kind)  # pyright: ignore
    model = load_model(base_of(small_model, "float32"), Adapter(rank=4, modules_to_save=("norm",)))
    optimizer = make_optimizer(training, model.trainable, lora_plus_ratio=ratio)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == {id(p) for p in model.trainable.values()}
    for step in range(5):
        rate = learning_rate(training, step, 4 + 1)
        set_learning_rate(optimizer, rate)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for name, parameter in model.trainable.items():
            assert rates[id(parameter)] == rate * (ratio if ".lora_B." in name else 1.0)


@pytest.mark.parametrize(
    "kind", ["default", "rslora", "dora", "pissa", "olora", "pissa-tokens-head", "tokens"]
)
def test_a_reference_that_is_synchronised_is_the_policy_to_the_bit(
    small_model: Path, tmp_path: Path, kind: str
):
    """At the start, and after each synchronisation; saved, both say what they said in memory."""
    base = base_of(small_model, "nf4-bfloat16")
    model = load_model(base, kind_of(kind), reference=Reference(sync_every=2))
    assert torch.equal(reference_logprobs(model, batch()), policy(model))
    steps(model, 3)
    sync_reference(model)
    reference = policy(model)
    assert torch.equal(reference_logprobs(model, batch()), reference)
    steps(model, 3)
    assert torch.equal(reference_logprobs(model, batch()), reference)
    assert not torch.equal(policy(model), reference)
    save_adapter(model, tmp_path / "policy")
    save_adapter(model, tmp_path / "reference", REFERENCE)
    folders = [str(tmp_path / name) for name in ("policy", "reference")]
    loaded = load_adapter(load_model(base), folders[0], reference=folders[1])
    assert torch.equal(policy(loaded), policy(model))
    assert torch.equal(reference_logprobs(loaded, batch()), reference)


@pytest.mark.parametrize("kind", ["default", "dora", "pissa", "pissa-tokens-head"])
def test_training_goes_on_from_an_exported_adapter(small_model: Path, tmp_path: Path, kind: str):
    """The policy that starts from it is its reference to the bit, and both are what was exported."""
    base = base_of(small_model, "nf4-bfloat16")
    model = load_model(base, kind_of(kind))
    steps(model, 3)
    save_adapter(model, tmp_path / "adapter")
    exported = policy(model)
    model = load_model(base, Adapter(start_from=str(tmp_path / "adapter")))
    assert torch.equal(policy(model), exported)
    assert torch.equal(reference_logprobs(model, batch()), exported)
    steps(model, 3)
    assert torch.equal(reference_logprobs(model, batch()), exported)
    assert (policy(model) - exported).abs().max() > 1e-3


def moe(**options) -> Model:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    network = build(config).requires_grad_(False)
    network.set_attn_implementation(NAME)
    network.train()
    adapter = Adapter(rank=2, targets=("q_proj",), **options)
    return add_adapter(Model(network, None, torch.float32), adapter)  # pyright: ignore


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def test_experts_get_low_rank_products_of_their_own(tmp_path: Path):
    model = moe(expert_targets=EXPERTS)
    shapes = {n.split(".mlp.")[1]: tuple(p.shape) for n, p in model.trainable.items() if "experts" in n}
    assert sorted(shape[0] for name, shape in shapes.items() if "lora_A" in name) == [
        8,
        8,
    ]  # 4 experts of rank 2
    reference, fingerprint = reference_logprobs(model, batch()), base_fingerprint(model)
    assert torch.equal(policy(model), reference)
    steps(model, 4)
    assert torch.equal(reference_logprobs(model, batch()), reference)
    assert base_fingerprint(model) == fingerprint
    trained = policy(model)
    assert (trained - reference).abs().max() > 1e-3
    assert all(bool(p.any()) for n, p in model.trainable.items() if "experts" in n and "lora_B" in n)
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = load_adapter(without_adapter(moe()), str(tmp_path / "adapter"))
    assert torch.equal(policy(loaded), trained)


def test_experts_are_merged_too():
    model = moe(expert_targets=EXPERTS)
    steps(model, 4)
    plain = AutoModelForCausalLM.from_config(model.causal.config, dtype=torch.float32)
    plain.load_state_dict(dict(merged_tensors(model.causal, plain, torch.float32)), strict=True)
    plain.set_attn_implementation(NAME)
    merged = policy(Model(plain, None, torch.float32))  # pyright: ignore
    assert (merged - policy(model)).abs().max() < 1e-5
    assert (merged - reference_logprobs(model, batch())).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["default", "dora", "pissa", "olora"])
def test_gpt2s_transposed_layers_start_as_nothing_and_merge(kind: str):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = build(config).requires_grad_(False)
    network.train()
    network.set_attn_implementation(NAME)
    model = add_adapter(Model(network, None, torch.float32), kind_of(kind))  # pyright: ignore
    assert torch.equal(policy(model), reference_logprobs(model, batch()))
    stir(model)
    for layer in model.adapter_layers:
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = x @ merged_weight(layer).float() + layer.get_base_layer().bias
            assert relative(made, layer(x)) < 1e-5


def without_adapter(model: Model) -> Model:
    assert isinstance(model.network, PeftModel)
    network = model.network.unload()
    return Model(network, None, torch.float32)  # pyright: ignore


def test_float32_adapters_take_updates_that_bfloat16_would_swallow(tmp_path: Path):
    """300 AdamW steps at a rate of 1e-6 under bfloat16 products move the entries that had a gradient."""
    folder = save_small_model(tmp_path, num_hidden_layers=1)
    adapter = Adapter(rank=2, targets=("q_proj", "up_proj"))
    model = load_model(base_of(folder, "nf4-bfloat16"), adapter)
    stir(model)
    before = {name: p.detach().clone() for name, p in model.trainable.items()}
    had = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.trainable.items()}
    optimizer = make_optimizer(Training(learning_rate=1e-6), model.trainable)
    items = branches(1)
    for _ in range(300):
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        for name, parameter in model.trainable.items():
            assert parameter.grad is not None
            had[name] |= parameter.grad != 0
        optimizer.step()
        optimizer.zero_grad()
    moved = sum(int(((p != before[n]) & had[n]).sum()) for n, p in model.trainable.items())
    possible = sum(int(mask.sum()) for mask in had.values())
    assert possible > 500
    assert moved >= 0.99 * possible
    # The same updates lost in bfloat16: half of a unit in the last place of 0.02 is 30 steps' worth and more.
    lost = sum(int((p.bfloat16() == before[n].bfloat16()).sum()) for n, p in model.trainable.items())
    assert lost > 0


def test_small_updates_of_an_adapter_with_a_start_act_in_bfloat16():
    """B − B₀ is taken in float32: rounded to bfloat16 first, most of B and B₀ are the same numbers."""
    generator = torch.Generator().manual_seed(0)
    b0, a0, x = (torch.randn(shape, generator=generator) for shape in ((24, 4), (4, 16), (10, 16)))
    b, a = b0 * (1 + 1e-4), a0 * (1 - 1e-4)
    b[:, 0] *= 1 + 1e-4
    exact = x.double() @ (b.double() @ a.double() - b0.double() @ a0.double()).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        doubled = factors_of_difference(a, a0, b, b0)
        ours: Tensor = _AddLowRank.apply(torch.zeros(10, 24), x, *doubled, 1.0)  # pyright: ignore
        plainly = (x @ a.T) @ b.T - (x @ a0.T) @ b0.T
    assert relative(ours.double(), exact) < 0.05
    assert relative(plainly.double(), exact) > 1


REFUSED = {
    "adapter.init=corda": "rewrites the base.*pissa keeps the base",
    "adapter.init=loftq": "rewrites the base.*pissa keeps the base",
    "adapter.init=orthogonal": "rewrites the base.*olora",
    "adapter.init=rslora": "a scaling.*adapter.rslora=true",
    "adapter.init=rank-stabilised": "a scaling.*adapter.rslora=true",
    "adapter.init=pisa": "takes one of default, gaussian, eva, pissa, olora. Did you mean pissa",
    "adapter.bias=all": "would still act when the adapter is off.*adapter.modules_to_save",
    "adapter.use_dora=true": "did you mean adapter.dora",
    "adapter.rank_pattern={q_proj: 2}": "did you mean adapter.ranks",
    "adapter.layers=one": 'adapter.layers got .*"0:8"',
    "adapter.ranks=[1]": "adapter.ranks got .* a mapping from module names",
    "adapter.ranks={q_proj: 0}": "adapter.ranks.q_proj got 0; it takes a whole number, at least 1",
    "adapter.alphas={'(': 2}": "no regular expression",
    "adapter.trained_tokens=[-1]": r"adapter.trained_tokens\[0\] got -1; .* at least 0",
    "adapter.lora_plus_ratio=0": "greater than 0",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_recipe_may_not_say_is_refused_with_the_alternative(text: str):
    with pytest.raises(RecipeError, match=REFUSED[text]):
        override(RECIPE, [text])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dora_and_a_start_that_is_subtracted_do_not_go_together(init: str):
    with pytest.raises(RecipeError, match=f"adapter.dora .*adapter.init={init} could not be subtracted"):
        Adapter(dora=True, init=init)


@pytest.mark.parametrize(
    "options",
    [{"dora": True}, {"dropout": 0.1}, {"init": "pissa"}, {"init": "eva"}, {"layers": "0:1"}],
    ids=str,
)
def test_what_does_not_go_with_experts_is_refused(options: dict):
    with pytest.raises(RecipeError, match=r"adapter\.expert_targets"):
        Adapter(expert_targets=EXPERTS, **options)


NOT_THERE = {
    "targets": ({"targets": ("q_proj", "query")}, "adapter.targets names query, which is no module"),
    "saved": ({"modules_to_save": ("head",)}, "adapter.modules_to_save names head, which is no module"),
    "list": ({"modules_to_save": ("layers",)}, "no weight of its own"),
    "quantized": ({"modules_to_save": ("layers.0.mlp",)}, "is quantized; name it in adapter.targets"),
    "token": ({"trained_tokens": ("no such token",)}, "'no such token', which is not one token"),
    "id": ({"trained_tokens": (100_000,)}, "names 100000, but the model has 288 embeddings"),
    "ranks": ({"ranks": {"query": 3}}, "adapter.ranks names query, which is no module that gets an adapter"),
    "layers": ({"layers": "1:", "targets": ("layers.0.mlp.up_proj",)}, "name nothing in the layers 1:"),
    "experts": ({"expert_targets": ("experts.up",)}, "names experts.up, which is no parameter"),
    "no experts": ({"expert_targets": ("norm.weight",)}, "does not hold several experts"),
    "rank": ({"init": "pissa", "rank": 65}, "adapter.rank 65 is more than .* has directions"),
    "embedding": ({"targets": ("q_proj", "embed_tokens")}, "names an embedding.*adapter.trained_tokens"),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_the_base_does_not_have_is_refused_by_name(small_model: Path, case: str):
    options, message = NOT_THERE[case]
    with pytest.raises(ModelError, match=message):
        load_model(base_of(small_model, "nf4-bfloat16"), Adapter(**{"rank": 2, **options}))


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_a_copy_of_one_of_two_tied_matrices_is_refused(tmp_path: Path):
    folder = save_small_model(tmp_path, tie_word_embeddings=True)
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ModelError, match=r"one matrix in this model.*adapter\.trained_tokens"):
            load_model(base_of(folder, "float32"), Adapter(rank=2, modules_to_save=(name,)))


RECIPE = Recipe(base=Base("some/model"), data=Data("pairs.jsonl"))


def test_every_option_survives_overrides_and_yaml():
    words = ["rank=8", "layers=0:8", "ranks={q_proj: 4}", "alphas={v_proj: 2.5}", "rslora=true", "init=olora"]
    words += ["trained_tokens=[5, <tool>]", "modules_to_save=lm_head", "lora_plus_ratio=16"]
    recipe = override(RECIPE, [f"adapter.{word}" for word in words])
    assert recipe.adapter == Adapter(
        rank=8,
        layers="0:8",
        ranks={"q_proj": 4},
        alphas={"v_proj": 2.5},
        rslora=True,
        init="olora",
        trained_tokens=(5, "<tool>"),
        modules_to_save=("lm_head",),
        lora_plus_ratio=16.0,
    )
    assert from_dict(yaml.safe_load(to_yaml(recipe))) == recipe
    assert Adapter(layers=[0, 1, "30:"]).layers == "0,1,30:"  # pyright: ignore[reportArgumentType]


def test_a_range_of_layers_that_yaml_reads_as_a_number_is_refused():
    """Unquoted, 4:8 is 248 to YAML: 4 · 60 + 8."""
    values = to_dict(RECIPE) | {"adapter": yaml.safe_load("layers: 4:8")}
    with pytest.raises(RecipeError, match=r"adapter\.layers got 248; .*in quotes"):
        from_dict(values)


def test_eva_starts_from_the_main_directions_of_what_each_layer_is_given(small_model: Path):
    """One micro-batch: the right singular vectors of the layer's inputs, here by a full decomposition."""
    model = load_model(base_of(small_model, "float32"), kind_of("eva"))
    seen: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.update({id(m): args[0][0].clone()}))
        for layer in model.adapter_layers
    ]
    items = branches()
    assert start_from_data(model, items, tokens_per_microbatch=10_000) == 1
    for handle in handles:
        handle.remove()
    for layer in model.adapter_layers:
        _, _, vectors = torch.linalg.svd(seen[id(layer)], full_matrices=False)
        ours = layer.lora_A["default"].weight.detach()
        assert torch.allclose(ours @ ours.T, torch.eye(4), atol=1e-4)
        assert relative(ours.T @ ours, vectors[:4].T @ vectors[:4]) < 0.01
    assert torch.equal(policy(model), reference_logprobs(model, batch()))


def test_eva_follows_the_directions_over_micro_batches():
    """Rows in pieces give nearly the directions of all rows together: what they hold of the energy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 30, generator=generator) * torch.linspace(3, 0.1, 30)
    directions = _Directions(5)
    for part in rows.split(50):
        directions.add(part)
    assert directions.rows is not None
    ours = torch.nn.functional.normalize(directions.rows[:5], dim=1)
    best = torch.linalg.svdvals(rows)[:5].square().sum()
    assert (rows @ ours.T).square().sum() > 0.99 * best


@pytest.mark.parametrize("kind", ["pissa", "pissa-tokens-head", "dora", "eva"])
def test_a_run_that_dies_resumes_to_the_same_adapter_bit_for_bit(
    small_model: Path, tmp_path: Path, kind: str
):
    """With a start that is subtracted and two learning rates; the finished run is opened and measured."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    recipe = Recipe(
        base=base_of(small_model, "nf4-bfloat16"),
        data=Data(str(tmp_path / "pairs.jsonl"), eval_last=8),
        adapter=kind_of(kind, dropout=0.1, lora_plus_ratio=4.0),
        training=Training(pairs_per_step=8, learning_rate=1e-3, epochs=9, max_steps=4, save_every=2),
        run_directory=str(tmp_path / "run"),
    )
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, observers=[crash], quiet=True)
    resumed = train(recipe, resume=True, quiet=True)
    files = [load_file(run.adapter_folder / "adapter_model.safetensors") for run in (whole, resumed)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    last = [record for record in resumed.records() if record["kind"] == "evaluation"][-1]
    result = evaluate_run(open_finished(resumed.path)).metrics
    assert result["loss"].mean == pytest.approx(last["eval/loss"], abs=1e-6)


def test_a_checkpoint_without_its_start_is_not_taken(small_model: Path, tmp_path: Path):
    base = base_of(small_model, "float32")
    model = load_model(base, kind_of("pissa"))
    save_for_resuming(load_model(base, kind_of("default")), tmp_path / "plain")
    with pytest.raises(RunError, match="another adapter than the recipe's"):
        restore_adapter(tmp_path / "plain", model)


def test_preflight_passes_with_tokens_that_are_in_no_example(small_model: Path):
    model = load_model(base_of(small_model, "nf4-bfloat16"), Adapter(rank=4, trained_tokens=(287,)))
    said: list[str] = []
    preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200, say=said.append)
    assert any("every log-ratio is exactly 0" in line for line in said)
