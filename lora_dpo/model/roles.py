"""The one base, its adapters, and the roles that they play."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_dpo.batching import Way
from lora_dpo.errors import ModelError
from lora_dpo.model.copies import compute_as_originals
from lora_dpo.model.dora import decompose
from lora_dpo.model.low_rank import add_in_place
from lora_dpo.model.offload import OffloadedActivations
from lora_dpo.model.placing import ask_for_own_tokens, widen_copies
from lora_dpo.model.switching import OFF, Switch, switches_of
from lora_dpo.probe import ASSUMED, Verdict
from lora_dpo.recipe import Base
from lora_dpo.ways import use_attention


@dataclass(eq=False)
class Model:
    """A causal language model with, or without, adapters on it.

    network: what is called. tokenizer: its tokenizer. compute_dtype: what matrix products run in.
    verdict: the way that micro-batches run through it, and why. offloading: what a forward pass saves for the
    backward pass waits in host memory.
    policy_adapters, reference_adapters: peft's names of the adapters that are on in that role; where there
    are none, all are off and the base speaks. reward_adapters: that of a reward model beside them.
    starts_as_reference: whether an untrained policy is its reference, to the bit. unquantized: bytes of the
    base that are not quantized, by what they are. base: what it was loaded from; None for a model that was
    made otherwise.
    """

    network: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    compute_dtype: torch.dtype
    verdict: Verdict = ASSUMED
    offloading: bool = False
    policy_adapters: tuple[str, ...] = ("default",)
    reference_adapters: tuple[str, ...] = ()
    reward_adapters: tuple[str, ...] = ()
    starts_as_reference: bool = True
    unquantized: Mapping[str, int] = field(default_factory=dict)
    base: Base | None = None

    @property
    def way(self) -> Way:
        return self.verdict.way

    @cached_property
    def causal(self) -> PreTrainedModel:
        """The transformers model, its linear layers wrapped where an adapter is on."""
        network = self.network
        return cast(PreTrainedModel, network.get_base_model() if isinstance(network, PeftModel) else network)

    @property
    def device(self) -> torch.device:
        # Not by the head: one with trained tokens makes its whole weight whenever it is asked for.
        return next(self.causal.parameters()).device

    @cached_property
    def head(self) -> nn.Linear:
        """The LM head: a linear layer, or one wrapped by an adapter, which is called as a module."""
        return cast(nn.Linear, self.causal.get_output_embeddings())

    @cached_property
    def adapter_layers(self) -> list[Any]:
        """peft's tuner layers: modules that hold a base layer and adapters for it."""
        return [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]

    @cached_property
    def switches(self) -> list[Switch]:
        roles = self.policy_adapters, self.reference_adapters, self.reward_adapters
        return switches_of(self.network, *roles)

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that receive gradients, by name, in a fixed order."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def autocast(self) -> AbstractContextManager:
        """Adapters are float32; under autocast their products run in the compute dtype, as the base's do."""
        if self.compute_dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, dtype=self.compute_dtype)
        return nullcontext()

    @cached_property
    def _copy_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def saving(self) -> AbstractContextManager:
        """Around the backbone's forward pass: where what it saves for the backward pass is kept."""
        if self.offloading and torch.is_grad_enabled():
            return OffloadedActivations(self._copy_stream).saving()
        return nullcontext()

    def checkpoint_layers(self, *, offload: bool = False) -> None:
        """Recompute each layer in the backward pass (non-reentrant: keyword arguments and RNG are kept).

        offload: keep the layers' inputs in pinned host memory until then; on the CPU that would save nothing.
        Raises ModelError where the architecture can't.
        """
        if not self.causal.supports_gradient_checkpointing:
            kind = self.causal.config.model_type
            raise ModelError(
                f"{kind} models can't recompute layers; use training.gradient_checkpointing=none"
            )
        self.offloading = offload and self.device.type == "cuda"
        options = {"use_reentrant": False}
        # transformers 5.2x renamed it.
        enable = getattr(self.causal, "activation_checkpointing_enable", None)
        if enable is None:
            self.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        else:
            enable(activation_checkpointing_kwargs=options)


def with_adapter(network: PeftModel, model: Model, **changes: Any) -> Model:
    """The model with what peft put on its network, all adapters added, in the policy's role.

    changes: fields of the new model. What requires a gradient now is what may ever get one.
    """
    adapted = dataclasses.replace(model, network=network, **changes)
    network.train()
    widen_copies(network)
    ask_for_own_tokens(network)
    for parameter in adapted.trainable.values():  # fixed here
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for layer in adapted.adapter_layers:
        # Autocast makes the products' inputs; peft would keep a float32 copy of each for the backward pass.
        layer.cast_input_dtype_enabled = model.compute_dtype not in (torch.bfloat16, torch.float16)
    compute_as_originals(network)
    add_in_place(adapted.adapter_layers)
    decompose(adapted.adapter_layers)
    _to_policy(adapted)
    return adapted


def _to_policy(model: Model) -> None:
    for switch in model.switches:
        switch.attributes.update(switch.policy)


@contextmanager
def as_reference(model: Model) -> Iterator[None]:
    """The frozen reference: its own adapters on, or all off. No gradients; a backward pass must not run
    inside.
    """
    for switch in model.switches:
        switch.attributes.update(switch.reference)
    try:
        with torch.no_grad():
            yield
    finally:
        _to_policy(model)


@contextmanager
def as_reward(model: Model) -> Iterator[None]:
    """The frozen reward model's adapter and score head on. No gradients.

    Raises ModelError where there is none.
    """
    if not model.reward_adapters:
        raise ModelError("there is no reward model on this base: RewardModel.put_on puts one there")
    for switch in model.switches:
        switch.attributes.update(switch.reward)
    try:
        with torch.no_grad():
            yield
    finally:
        _to_policy(model)


@contextmanager
def as_base(model: Model) -> Iterator[None]:
    """All adapters off, whatever the reference is. No gradients."""
    for switch in model.switches:
        switch.attributes.update(OFF)
    try:
        with torch.no_grad():
            yield
    finally:
        _to_policy(model)


@contextmanager
def as_policy(model: Model) -> Iterator[None]:
    """The policy's adapters on. This is how a model is outside of `as_reference`; the context says so where
    it matters.
    """
    _to_policy(model)
    yield


@contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """The adapters' dropout off, for evaluation. Everything else stays in train mode, quantized layers
    above all.
    """
    dropouts = [m for layer in model.adapter_layers for m in layer.modules() if isinstance(m, nn.Dropout)]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module in dropouts:
            module.training = True


def recomputing(network: nn.Module) -> list[Any]:
    """The modules that are set to recompute layers in the backward pass."""
    return [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def generating(model: Model) -> Iterator[None]:
    """For `generate`: the model's own attention with its mask and cache, no checkpointing, no dropout."""
    # Not the layers alone: the backbone would do without a cache if it believed that they are recomputed.
    recomputed = recomputing(model.causal)
    for module in recomputed:
        module.gradient_checkpointing = False
    use_attention(model.causal, "single")  # its own
    try:
        with torch.no_grad(), without_dropout(model), model.autocast():
            yield
    finally:
        use_attention(model.causal, model.way)
        for module in recomputed:
            module.gradient_checkpointing = True
