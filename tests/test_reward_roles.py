"""Base, policy, reference and reward model on one base: each as if it were alone, whatever came before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import random_branches, with_random_adapter
from torch import Tensor

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError
from lora_dpo.logprobs import sequence_rewards
from lora_dpo.losses import DPO, BradleyTerry
from lora_dpo.model import (
    REWARD,
    Model,
    adapter_tensors,
    as_base,
    as_policy,
    as_reference,
    as_reward,
    generating,
    load_adapter,
    load_model,
    put_reward,
    save_adapter,
)
from lora_dpo.recipe import Adapter, Base, Reference
from lora_dpo.reference import base_fingerprint, fingerprint_in_memory, reference_logprobs
from lora_dpo.training import step_gradient
from lora_dpo.ways import use_attention

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ROLES: dict[str, Callable[[Model], Any]] = {
    "base": as_base,
    "policy": as_policy,
    "reference": as_reference,
    "reward": as_reward,
}
every_base = pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("none", "float32")])


def branches() -> list[Any]:
    rng = np.random.default_rng(0)
    return [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(4)]


def logits(model: Model) -> Tensor:
    """Of the language model, in whatever role it is."""
    ids = torch.arange(24)[None] % 90
    model.causal.set_attn_implementation("sdpa")
    with torch.no_grad(), model.autocast():
        found = model.causal(input_ids=ids).logits
    use_attention(model.causal, model.way)
    return found


def rewards(model: Model) -> Tensor:
    items = branches()
    with torch.no_grad():
        return sequence_rewards(model, collate(items, range(len(items))))


def spoken(model: Model, role: str) -> list[Tensor]:
    """What a role says: logits, and as a reward model rewards."""
    with ROLES[role](model):
        return [logits(model), *([rewards(model)] if role == "reward" else [])]


def saved(base: Base, folder: Path, seed: int, *, reward: bool = False) -> str:
    model = load_model(base, Adapter(rank=4), reference=None, rewards=reward)
    save_adapter(with_random_adapter(model, seed=seed), folder)
    return str(folder)


def alone(base: Base, folder: str | None, *, reward: bool = False) -> list[Tensor]:
    model = load_model(base)
    if folder is None:
        return [logits(model)]
    if reward:
        return spoken(put_reward(model, folder), "reward")
    return [logits(load_adapter(model, folder))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def base_of(folder: Path, quantization: str, dtype: str) -> Base:
    return Base(str(folder), quantization=quantization, compute_dtype=dtype)  # pyright: ignore[reportArgumentType]


@every_base
def test_every_role_says_what_it_says_alone_after_any_order_of_switches(
    quantization: str, dtype: str, small_model: Path, tmp_path: Path
):
    """All orders of the four roles, with the policy's training steps between."""
    base = base_of(small_model, quantization, dtype)
    folders = {"reference": saved(base, tmp_path / "reference", 2)}
    folders["reward"] = saved(base, tmp_path / "reward", 3, reward=True)
    start = saved(base, tmp_path / "start", 4)
    expected = {
        "base": alone(base, None),
        "reference": alone(base, folders["reference"]),
        "reward": alone(base, folders["reward"], reward=True),
    }
    model = load_model(base, Adapter(start_from=start), reference=Reference(adapter=folders["reference"]))
    model = put_reward(model, folders["reward"])
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-2)
    told = []
    for trained in range(2):
        policy = start if not trained else str(tmp_path / "trained")
        if trained:
            for _ in range(2):
                step_gradient(model, DPO(), branches(), tokens_per_microbatch=100, seed=0)
                optimizer.step()
            save_adapter(model, Path(policy))
        expected["policy"] = alone(base, policy)
        told.append(expected["policy"])
        for order in itertools.permutations(ROLES):
            for role in order:
                assert same(spoken(model, role), expected[role]), (trained, order, role)
    assert not same(*told), "training changed nothing, so nothing was tested"
    distinct = [expected[role][0] for role in ROLES]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(distinct, 2))


@every_base
def test_every_pair_of_roles_with_errors_generation_and_steps_between_leaves_each_as_it_is_alone(
    quantization: str, dtype: str, small_model: Path, tmp_path: Path
):
    """All ordered pairs in random order; errors in a role, text generated in it, and steps of the policy."""
    base = base_of(small_model, quantization, dtype)
    reference, reward = saved(base, tmp_path / "reference", 2), saved(base, tmp_path / "r", 3, reward=True)
    start = saved(base, tmp_path / "start", 4)
    expected = {
        "base": alone(base, None),
        "reference": alone(base, reference),
        "reward": alone(base, reward, reward=True),
        "policy": alone(base, start),
    }
    model = load_model(base, Adapter(start_from=start), reference=Reference(adapter=reference))
    model = put_reward(model, reward)
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-2)
    rng = np.random.default_rng(7)
    for n, pair in enumerate(rng.permutation(list(itertools.product(ROLES, ROLES)))):
        if n % 5 == 4:
            step_gradient(model, DPO(), branches(), tokens_per_microbatch=100, seed=n)
            optimizer.step()
            save_adapter(model, tmp_path / f"step{n}")
            before, expected["policy"] = expected["policy"], alone(base, str(tmp_path / f"step{n}"))
            assert not same(before, expected["policy"])
        for role in map(str, pair):
            if n % 2:
                with ROLES[role](model), generating(model):
                    model.causal.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)  # pyright: ignore[reportCallIssue]
            else:
                with pytest.raises(KeyError), ROLES[role](model):
                    raise KeyError
            assert same(spoken(model, role), expected[role]), (n, pair, role)


@every_base
def test_training_a_reward_model_leaves_the_base_as_it_was(quantization: str, dtype: str, small_model: Path):
    """Adapters and head off, it is the base to the bit, with the fingerprint that it has without a head."""
    base = base_of(small_model, quantization, dtype)
    bare = load_model(base)
    expected, print_before = logits(bare), base_fingerprint(bare)
    items = branches()
    known = reference_logprobs(load_model(base), collate(items, range(len(items))))
    model = load_model(base, Adapter(rank=4), reference=None, rewards=True)
    assert torch.equal(rewards(model), torch.zeros(4, 2)), "a new head gives nothing"
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-2)
    for _ in range(3):
        step_gradient(model, BradleyTerry(), items, tokens_per_microbatch=100, seed=0)
        optimizer.step()
    assert rewards(model).abs().max() > 1e-3
    with as_reference(model):
        assert torch.equal(logits(model), expected)
        assert torch.equal(reference_logprobs(model, collate(items, range(len(items)))), known)
    assert base_fingerprint(model) == print_before


def test_a_reward_model_is_frozen_and_leaves_the_policy_its_gradients(small_model: Path, tmp_path: Path):
    base = base_of(small_model, "nf4", "float32")
    folder = saved(base, tmp_path / "reward", 3, reward=True)
    items = branches()

    def gradients(model: Model) -> dict[str, Tensor]:
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        return {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}

    without = gradients(with_random_adapter(load_model(base, Adapter(rank=4))))
    model = put_reward(with_random_adapter(load_model(base, Adapter(rank=4))), folder)
    before = {n: t.clone() for n, t in adapter_tensors(model.network, REWARD).items()}  # pyright: ignore
    mark = fingerprint_in_memory(model, REWARD)
    found = gradients(model)
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in found)
    after = adapter_tensors(model.network, REWARD)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fingerprint_in_memory(model, REWARD) == mark


def test_rewards_need_a_reward_model_and_one_is_enough(small_model: Path, tmp_path: Path):
    base = base_of(small_model, "none", "float32")
    model = load_model(base, Adapter(rank=4))
    with pytest.raises(ModelError, match=r"RewardModel\.put_on"), as_reward(model):
        pass
    with pytest.raises(ModelError, match="no score head"):
        rewards(model)
    folder = saved(base, tmp_path / "reward", 3, reward=True)
    model = put_reward(model, folder)
    with pytest.raises(ModelError, match="no score head"):
        rewards(model)  # in the policy's role
    with pytest.raises(ModelError, match="already"):
        put_reward(model, folder)
