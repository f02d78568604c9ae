"""A model from a recipe: the base, the policy's adapter, and the adapter that speaks as its reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftModel

from lora_dpo.errors import ModelError
from lora_dpo.model.adapters import add_adapter
from lora_dpo.model.bare import check_bare
from lora_dpo.model.base import load_base, load_tokenizer, unquantized_bytes, verdict_on
from lora_dpo.model.placing import put_on
from lora_dpo.model.roles import Model, with_adapter
from lora_dpo.model.saved import (
    SavedAdapter,
    adapter_tensors,
    called,
    check_left_out,
    find_adapter,
    in_memory,
    read_adapter,
    with_new_score,
)
from lora_dpo.model.score import Kind
from lora_dpo.model.stored import weight_files
from lora_dpo.model.trained_on import check_base, read_record
from lora_dpo.recipe import Adapter, Base, Reference

POLICY, REFERENCE, REWARD = "default", "reference", "reward"
"""peft's names of the adapter that is trained and of the frozen ones."""

AUTO = Reference()


def load_model(
    base: Base,
    adapter: Adapter | None = None,
    *,
    seed: int = 0,
    reference: Reference | None = AUTO,
    on: Model | None = None,
    rewards: bool = False,
) -> Model:
    """The base, with an adapter to train where one is given, and with its reference.

    A fresh adapter's initial values are a function of the seed. reference: None loads none, for an objective
    that needs none. on: this base as it lies in memory already (see `bare`); nothing is loaded but adapters.
    rewards: the adapter is trained as a reward model, with a score head; one from a folder may be a language
    model's. Raises ModelError or RecipeError where something can't be had, or an adapter was trained on
    another base.
    """
    if adapter is not None:
        check_early(base, adapter.start_from, "adapter.start_from")
        check_early(base, reference.adapter if reference else None, "reference.adapter")
    model = _load(base) if on is None else _in_memory(on, base)
    if adapter is None:
        return model
    started = adapter.start_from is not None
    if started:
        model = _start_from(model, adapter, rewards)
    else:
        model = add_adapter(model, adapter, seed=seed, rewards=rewards)
    return model if reference is None else _with_reference(model, adapter, reference)


def _load(base: Base) -> Model:
    tokenizer, verdict = load_tokenizer(base), verdict_on(base)
    network = load_base(base, verdict.way)
    unquantized = unquantized_bytes(network)
    return Model(network, tokenizer, network.dtype, verdict, unquantized=unquantized, base=base)


def _in_memory(model: Model, base: Base) -> Model:
    """The model, if it is this base alone."""
    check_bare(model)
    if model.base != base:
        raise ModelError(f"the base in memory was loaded from {model.base}, and this asks for {base}")
    return dataclasses.replace(model)


def load_adapter(model: Model, folder: str, *, reference: str | None = None, kind: Kind = "policy") -> Model:
    """A base with a finished adapter from a folder, frozen; and with another one as its reference.

    kind: whose it must be; a reward model's is then on in the policy's role, as it was trained.
    Raises ModelError where one of them can't be used, or was trained on another base.
    """
    model = _put(model, read_adapter(folder, "the adapter", kind=kind), POLICY)
    if reference is None:
        return model
    return _put(model, read_adapter(reference, "the reference"), REFERENCE, reference_adapters=(REFERENCE,))


def check_early(base: Base, folder: str | None, key: str) -> None:
    """Raise ModelError for an adapter of another base before the minutes that loading this one takes.

    Where the base's files are here by now; whether or not, `load_adapter` and `load_model` look again.
    """
    if folder is None:
        return
    place = find_adapter(folder, key)
    record = read_record(place)
    try:
        weight_files(base)
    except ModelError:
        return
    check_base(record, base, called(key, place))


def _start_from(model: Model, adapter: Adapter, rewards: bool) -> Model:
    """The policy is the adapter of a folder, complete, in float32; its dropout is the recipe's."""
    assert adapter.start_from is not None
    saved = read_adapter(adapter.start_from, "adapter.start_from", kind="any" if rewards else "policy")
    check_left_out(adapter, saved)
    if rewards:
        saved = with_new_score(saved, model.causal.config.get_text_config().hidden_size)
    return _put(model, saved, POLICY, trainable=True, dropout=adapter.dropout)


def _with_reference(model: Model, adapter: Adapter, reference: Reference) -> Model:
    kind = reference.of(adapter.start_from)
    if kind == "adapter":
        assert reference.adapter is not None
        saved, names = read_adapter(reference.adapter, "reference.adapter"), (REFERENCE,)
        return _put(model, saved, REFERENCE, reference_adapters=names, starts_as_reference=False)
    if kind == "base" and not reference.sync_every:
        model.starts_as_reference = adapter.start_from is None
        return model
    # A copy of the policy as it starts, with what is subtracted from both. To be synchronised, the reference
    # of a fresh adapter is one too: at first it adds nothing, as the policy does.
    assert isinstance(model.network, PeftModel)
    names = tuple(REFERENCE if name == POLICY else name for name in model.policy_adapters)
    return _put(model, in_memory(model.network, POLICY), REFERENCE, reference_adapters=names)


def _put(
    model: Model,
    saved: SavedAdapter,
    name: str,
    *,
    trainable: bool = False,
    dropout: float = 0.0,
    **changes: Any,
) -> Model:
    """The model with an adapter more. changes: fields of the new model."""
    check_base(saved.record, model.base, called(saved.key, saved.folder))
    network = put_on(
        model.network,
        saved,
        name,
        compute_dtype=model.compute_dtype,
        trainable=trainable,
        dropout=dropout,
    )
    return with_adapter(network, model, **changes)


def put_reward(model: Model, folder: str, key: str = "the reward model") -> Model:
    """The model with a reward model's adapter and score head more, frozen, for `as_reward`.

    Policy and reference stay as they are. Raises ModelError where it can't be used, was trained on another
    base, or one is there already.
    """
    if model.reward_adapters:
        raise ModelError(f"{key}: there is a reward model on this base already")
    saved = read_adapter(folder, key, kind="reward")
    return _put(model, saved, REWARD, reward_adapters=(REWARD,))


def sync_reference(model: Model) -> None:
    """The reference becomes the policy as it is now: θ_ref ← θ, in place, to the bit.

    The hard update of TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656). Raises ModelError where the
    reference is the base.
    """
    if REFERENCE not in model.reference_adapters or not isinstance(model.network, PeftModel):
        raise ModelError("the base is never written to: a reference that is synchronised has its own adapter")
    policy, reference = (adapter_tensors(model.network, name) for name in (POLICY, REFERENCE))
    with torch.no_grad():
        for name, tensor in reference.items():
            tensor.copy_(policy[name])
