"""One base, several roles: adapters off is the base to the bit, and nothing but the adapter ever changes."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import gradient, random_branches, with_random_adapter

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError, PreflightError
from lora_dpo.evaluation import batch_logprobs, evaluate
from lora_dpo.losses import DPO
from lora_dpo.model import Model, as_reference, load_base, load_model, load_tokenizer
from lora_dpo.recipe import Adapter, Base
from lora_dpo.reference import reference_logprobs
from lora_dpo.training import preflight, step_gradient

QUANTIZATIONS = [
    ("nf4", "bfloat16"),
    ("fp4", "bfloat16"),
    ("int8", "bfloat16"),
    ("none", "bfloat16"),
    ("nf4", "float32"),
]


def branches(count: int = 6):
    rng = np.random.default_rng(0)
    return [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(count)]


def base_of(folder: Path, quantization: str = "nf4", dtype: str = "bfloat16", **more) -> Base:
    return Base(str(folder), quantization=quantization, compute_dtype=dtype, **more)  # pyright: ignore


def snapshot(model: Model) -> dict[str, bytes]:
    """The bytes of every tensor that isn't the adapter's, quantization state included."""
    out = {}
    for name, tensor in model.causal.state_dict().items():
        if "lora_" not in name:
            out[name.replace("base_layer.", "")] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return out


@pytest.mark.parametrize(("quantization", "dtype"), QUANTIZATIONS)
def test_the_untrained_policy_is_its_reference_to_the_bit(small_model: Path, quantization: str, dtype: str):
    """Every log-ratio is exactly 0 and the loss exactly ln 2, on every quantization."""
    model = load_model(base_of(small_model, quantization, dtype), Adapter(rank=4))
    items = branches()
    logprobs = batch_logprobs(model, DPO(), collate(items, range(len(items))))
    assert torch.equal(logprobs.log_ratio, torch.zeros_like(logprobs.log_ratio))
    loss = DPO()(logprobs).per_example
    assert torch.equal(loss, torch.full_like(loss, math.log(2.0)))


@pytest.mark.parametrize(("quantization", "dtype"), QUANTIZATIONS)
def test_training_leaves_the_base_as_it_was(small_model: Path, quantization: str, dtype: str):
    """After steps, evaluation and more steps: every base tensor bit-equal, adapters off gives the base's
    logits.
    """
    base = base_of(small_model, quantization, dtype)
    network = load_base(base)
    alone = Model(network, load_tokenizer(base), network.dtype)
    items = branches()
    batch = collate(items, range(len(items)))
    expected = reference_logprobs(alone, batch)
    model = load_model(base, Adapter(rank=4))
    before = snapshot(model)
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-2)
    for _ in range(3):
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        optimizer.step()
        evaluate(model, DPO(), items)
    assert snapshot(model) == before
    assert torch.equal(reference_logprobs(model, batch), expected)
    trained = batch_logprobs(model, DPO(), batch).log_ratio
    assert trained.abs().max() > 1e-3, "the adapter learned nothing, so nothing was tested"
    ids = batch.token_ids[None, :12]
    alone.causal.set_attn_implementation("sdpa")
    model.causal.set_attn_implementation("sdpa")
    with as_reference(model):
        assert torch.equal(model.causal(input_ids=ids).logits, alone.causal(input_ids=ids).logits)


def test_evaluating_first_does_not_change_gradients(small_model: Path):
    """The bitsandbytes trap: an eval-mode forward re-packs 4-bit weights in place on some CPUs."""
    items = branches()

    def step(evaluated: bool) -> torch.Tensor:
        model = with_random_adapter(load_model(base_of(small_model), Adapter(rank=4)))
        if evaluated:
            evaluate(model, DPO(), items)
            model.network.eval()
            with torch.no_grad():
                reference_logprobs(model, collate(items, range(len(items))))
            model.network.train()
        step_gradient(model, DPO(), items, tokens_per_microbatch=1000, seed=0)
        return gradient(model)

    assert torch.equal(step(evaluated=True), step(evaluated=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapter_parameters_receive_gradients(small_model: Path, checkpointing: bool):
    model = with_random_adapter(load_model(base_of(small_model), Adapter(rank=4)))
    if checkpointing:
        model.checkpoint_layers()
    step_gradient(model, DPO(), branches(), tokens_per_microbatch=1000, seed=0)
    for name, parameter in model.network.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.dtype == torch.float32 or "lora_" not in name


def test_checkpointing_does_not_change_the_gradient(small_model: Path):
    gradients = []
    for checkpointing in (False, True):
        model = with_random_adapter(load_model(base_of(small_model), Adapter(rank=4, dropout=0.2)))
        if checkpointing:
            model.checkpoint_layers()
        step_gradient(model, DPO(), branches(), tokens_per_microbatch=1000, seed=7)
        gradients.append(gradient(model))
    assert torch.equal(*gradients)


def test_all_linear_layers_but_the_head_get_an_adapter(small_model: Path):
    model = load_model(base_of(small_model), Adapter(rank=4))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in model.trainable}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_seed_alone_decides_the_adapter(small_model: Path):
    def first(seed: int, stir: int) -> torch.Tensor:
        torch.manual_seed(stir)
        return next(iter(load_model(base_of(small_model), Adapter(rank=4), seed=seed).trainable.values()))

    assert torch.equal(first(1, 10), first(1, 20))
    assert not torch.equal(first(1, 10), first(2, 10))


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_targets_that_an_export_would_lose_are_refused(tmp_path: Path):
    from builders import save_small_model

    tied = save_small_model(tmp_path, tie_word_embeddings=True)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ModelError, match=r"adapter\.targets names"):
            load_model(base_of(tied), Adapter(rank=4, targets=("q_proj", name)))


def test_unknown_targets_and_missing_models_are_refused_in_words(small_model: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        load_model(base_of(small_model), Adapter(targets=("no_such_layer",)))
    with pytest.raises(ModelError, match="no folder"):
        load_model(Base(str(tmp_path / "absent")))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(Base("nobody/nothing-here"))


def test_preflight_passes_and_leaves_the_adapter_as_it_was(small_model: Path):
    model = load_model(base_of(small_model), Adapter(rank=4))
    before = {name: p.detach().clone() for name, p in model.trainable.items()}
    said: list[str] = []
    preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200, say=said.append)
    assert len(said) == 6
    assert said[0].startswith("llama: prefixes shared (float64 probe:")
    assert all(torch.equal(before[name], p) for name, p in model.trainable.items())
    assert all(p.grad is None for p in model.network.parameters())


def test_preflight_refuses_a_policy_that_is_not_its_reference(small_model: Path):
    model = with_random_adapter(load_model(base_of(small_model), Adapter(rank=4)))
    with pytest.raises(PreflightError, match="exactly 0"):
        preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200)


def test_preflight_refuses_a_base_that_trains(small_model: Path):
    model = load_model(base_of(small_model, "none"), Adapter(rank=4))
    model.causal.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(PreflightError, match="embed_tokens"):
        preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200)


def test_preflight_refuses_a_model_that_is_run_the_wrong_way():
    """A recurrent layer carries one branch's state into the next; here nobody probed."""
    from transformers import Mamba2Config

    from lora_dpo.model import add_adapter

    config = Mamba2Config(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=2,
    )
    from builders import build

    network = build(config).requires_grad_(False)
    model = add_adapter(Model(network, None, torch.float32), Adapter(rank=4, targets=("in_proj",)))  # pyright: ignore
    with pytest.raises(PreflightError, match="wrong when run 'shared'"):
        preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200)


def test_preflight_names_the_row_that_does_not_fit(small_model: Path, monkeypatch: pytest.MonkeyPatch):
    module = import_module("lora_dpo.training.preflight")
    genuine = module.batch_logprobs

    def failing(model, objective, batch):
        if batch.tokens > 60:
            raise torch.OutOfMemoryError("simulated")
        return genuine(model, objective, batch)

    monkeypatch.setattr(module, "batch_logprobs", failing)
    rng = np.random.default_rng(0)
    items = [*(random_branches(rng, 4, (3, 3)) for _ in range(3)), random_branches(rng, 40, (20, 20), row=77)]
    model = load_model(base_of(small_model), Adapter(rank=4))
    with pytest.raises(PreflightError, match=r"80 tokens, random row 77.*data\.max_tokens"):
        preflight(model, DPO(), items, examples_per_step=4, tokens_per_microbatch=200)
    assert all(p.grad is None for p in model.network.parameters())


def test_dropout_and_jitter_of_the_base_are_off():
    from transformers import GPT2Config

    from lora_dpo.model.base import without_noise

    config = GPT2Config()
    assert config.resid_pdrop > 0
    without_noise(config)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.0
