"""Before the first step: is the policy its reference, do gradients go where they should, will the longest
fit?
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dpo.batching import MicroBatch, collate, cost, pack
from lora_dpo.errors import PreflightError, RunError
from lora_dpo.evaluation import all_logprobs, batch_logprobs, does_not_fit
from lora_dpo.logprobs import vocabulary
from lora_dpo.losses import Objective
from lora_dpo.model import Model, as_reference, generating, without_dropout
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.reference import BASE, ReferenceCache, reference_fingerprint, reference_logprobs
from lora_dpo.tokenization import Branches
from lora_dpo.training.optimizer import allocate
from lora_dpo.training.step import SMALLER
from lora_dpo.ways import has_experts

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""How far a token's log-prob may differ, on average, between packed branches and a sequence by itself."""


def preflight(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    *,
    examples_per_step: int,
    tokens_per_microbatch: int,
    fresh_adapter: bool = True,
    cache: ReferenceCache | None = None,
    held_out: Sequence[Branches] = (),
    optimizer: torch.optim.Optimizer | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Check, on the real model and data, what training relies on. Leaves the adapter's values as they were.

    What `cache` holds of the branches, and of those `held_out`, is compared with a fresh computation; a cache
    that differs is emptied. optimizer: gets its moments here, so that memory is short now if it ever is.
    `say` is told each check in one line.

    Raises PreflightError, naming what is wrong and what to do.
    """
    few = sorted(branches, key=lambda item: item.tokens)[: min(4, len(branches))]
    longest = max(branches, key=lambda item: cost([item], model.way))
    say(f"{model.causal.config.model_type}: {model.verdict}")
    batch = collate(few, range(len(few))).to(model.device)
    try:
        with without_dropout(model):
            _check_runs(model, batch)
            if fresh_adapter and objective.needs_reference:
                say((_check_start if model.starts_as_reference else _say_start)(model, objective, batch))
            if fresh_adapter and objective.needs.rewards:
                say(_say_rewards(model, objective, batch))
            say(_check_packing(model, longest))
            say(_check_isolation(model, few))
            if fresh_adapter:
                say(_check_gradients(model, objective, batch))
            if cache is not None and cache.on:
                say(_check_cache(model, cache, [*branches, *held_out]))
        if optimizer is not None:
            allocate(optimizer, model.trainable)
        say(_check_longest(model, objective, branches, examples_per_step, tokens_per_microbatch))
        if held_out:
            say(_check_evaluation(model, objective, held_out))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(f"{does_not_fit([longest], model.way)}: {SMALLER}") from error
    finally:
        model.network.zero_grad(set_to_none=True)


def _check_runs(model: Model, batch: MicroBatch) -> None:
    """The real model runs the way that its small copy did."""
    try:
        reference_logprobs(model, batch)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        kind = model.causal.config.model_type
        raise PreflightError(f"this {kind} model does not run {model.way!r}: {error}") from error


def _check_start(model: Model, objective: Objective, batch: MicroBatch) -> str:
    """A fresh adapter adds exactly nothing: every log-ratio is 0, and the loss is the objective's value
    there.
    """
    logprobs = batch_logprobs(model, objective, batch)
    ratio = logprobs.log_ratio.abs().max().item()
    if ratio != 0.0:
        raise PreflightError(
            f"the untrained policy differs from its reference by {ratio:.3g} nats on one pair, where it must"
            " be exactly 0: the base does not give the same result twice, or the adapter is not fresh (name"
            " one that was trained before in adapter.start_from: it is then its own reference)"
        )
    loss = objective(logprobs).per_example.mean().item()
    return f"policy = reference at the start: every log-ratio is exactly 0, loss {loss:.6f}"


def _say_start(model: Model, objective: Objective, batch: MicroBatch) -> str:
    """Where the policy starts from one adapter and is compared with another, or with the base."""
    ratio = batch_logprobs(model, objective, batch).log_ratio.abs().mean().item()
    return (
        f"policy and reference differ from the start, as the recipe has it: log-ratios are {ratio:.3g} nats"
        " on average, and that they be 0 is not checked"
    )


def _say_rewards(model: Model, objective: Objective, batch: MicroBatch) -> str:
    """A new score head is all zeros, and has no preference; one that was trained before has."""
    logprobs = batch_logprobs(model, objective, batch)
    loss, largest = objective(logprobs).per_example.mean().item(), logprobs.policy.abs().max().item()
    if largest == 0.0:
        return f"the score head is new: every reward is exactly 0, loss {loss:.6f}"
    return f"the score head was trained before: rewards up to {largest:.3g}, loss {loss:.6f}"


def _check_packing(model: Model, item: Branches) -> str:
    """The model's way agrees with each sequence by itself under its own attention, head included."""
    batch = collate([item], [0]).to(model.device)
    packed = reference_logprobs(model, batch)
    with generating(model), as_reference(model):
        alone = torch.cat([_alone(model, item, side) for side in range(item.sides)])
    difference = (packed - alone).abs().mean().item()
    if not difference <= TOLERANCE[model.compute_dtype]:
        raise PreflightError(
            f"this {model.causal.config.model_type} model is wrong when run {model.way!r}: log-probs differ"
            f" by {difference:.3g} nats a token from one sequence at a time"
        )
    return f"micro-batches agree with single sequences to {difference:.1g} nats a token"


def _alone(model: Model, item: Branches, side: int) -> Tensor:
    """Log-probs of a side's scored tokens [S], from the whole model's own logits."""
    ids = torch.from_numpy(item.side(side).astype(np.int64)).to(model.device)
    at = torch.from_numpy(np.flatnonzero(item.scored[side])).to(model.device)
    kept = {"logits_to_keep": at - 1} if _keeps_logits(model) else {}
    logits = model.causal(input_ids=ids[None], use_cache=False, **kept).logits[0]
    logits = logits if kept else logits[at - 1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = zip(logits.split(64), ids[at].split(64), strict=True)
    return torch.cat([-cross_entropy(part.to(wide), target, reduction="none") for part, target in parts])


def _keeps_logits(model: Model) -> bool:
    """Whether the model makes logits of some positions only; a few make all of them, whatever is asked."""
    return "logits_to_keep" in inspect.signature(type(model.causal).forward).parameters


def _check_isolation(model: Model, items: Sequence[Branches]) -> str:
    """Changing one branch leaves every other one's log-probs as they were, to the bit."""
    if model.way in ("padded", "single"):
        return "every response is a row of its own"
    batch = collate(items, range(len(items))).to(model.device)
    changed = _with_first_rest_changed(batch, vocabulary(model))
    if changed is None:
        return "no branch is long enough to test that branches don't see each other"
    before, after = reference_logprobs(model, batch), reference_logprobs(model, changed)
    others = batch.sequences != 0
    leak = (before - after)[others].abs().max().item() if bool(others.any()) else 0.0
    allowed = 0.05 if has_experts(model.causal) else 0.0
    if leak > allowed:
        raise PreflightError(
            f"this {model.causal.config.model_type} model is wrong when run {model.way!r}: what one branch"
            f" holds changes another's log-probs by {leak:.3g} nats"
        )
    return "branches don't see each other"


def _with_first_rest_changed(batch: MicroBatch, tokens: int) -> MicroBatch | None:
    """The batch with every token of the first example's first rest replaced by its neighbour in the
    vocabulary.
    """
    own = (batch.layout.example == 0) & (batch.layout.branch == 1)
    if not bool(own.any()):
        return None
    ids = torch.where(own, (batch.token_ids + 1) % tokens, batch.token_ids)
    return replace(batch, token_ids=ids, keys=())  # their keys are other examples'


def _check_gradients(model: Model, objective: Objective, batch: MicroBatch) -> str:
    """With a small random B, every adapter tensor gets a finite gradient, nothing else any, the reference
    stays.
    """
    before = reference_logprobs(model, batch)
    with _perturbed(model):
        loss = objective(batch_logprobs(model, objective, batch))
        loss.per_example.sum().backward()
        if not torch.equal(before, reference_logprobs(model, batch)):
            raise PreflightError("the reference is not frozen: changing the policy's adapter changed it")
    dead = [
        name
        for name, p in model.trainable.items()
        # A token that is trained may be in none of these examples.
        if not _reached(p.grad, allow_zero=has_experts(model.causal) or "trainable_tokens" in name)
    ]
    stray = [
        n for n, p in model.network.named_parameters() if p.grad is not None and n not in model.trainable
    ]
    model.network.zero_grad(set_to_none=True)
    if dead or stray:
        which = f"{len(dead)} adapter tensors get none, such as {dead[0]}" if dead else f"{stray[0]} gets one"
        raise PreflightError(f"gradients do not go where they should: {which}")
    count = sum(p.numel() for p in model.trainable.values())
    return f"gradients reach the adapter's {count:,} parameters and nothing else"


def _reached(grad: Tensor | None, *, allow_zero: bool) -> bool:
    """A gradient is there and finite; all zeros only where an expert may see no token."""
    if grad is None or not bool(torch.isfinite(grad).all()):
        return False
    return allow_zero or bool(grad.any())


@contextmanager
def _perturbed(model: Model) -> Iterator[None]:
    """A fresh adapter has B = 0, which hides every gradient of A: small random values for the while."""
    kept = {name: p.detach().clone() for name, p in model.trainable.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in model.trainable.values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += 1e-2 * noise.to(parameter)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.trainable.items():
                parameter.copy_(kept[name])


def _check_cache(model: Model, cache: ReferenceCache, branches: Sequence[Branches]) -> str:
    """A few of the kept log-probs are what the reference says now, to rounding; else none of them is kept."""
    known = cache.known(item.key for item in branches)
    found = [item for item in branches if item.key in known]
    fingerprint = reference_fingerprint(model)
    who = fingerprint if fingerprint == BASE else f"adapter {fingerprint[:8]}"
    share = f"reference {who}, {len(found):,} of {len(branches):,} examples already in the cache"
    few = sorted(found, key=lambda item: item.tokens)[:4]
    if not few:
        return f"{share} ({cache.file})"
    batch = collate(few, range(len(few))).to(model.device)
    kept = cache.peek(batch)
    if kept is None:
        return f"{share}; some are damaged and will be computed again"
    difference = (kept - reference_logprobs(model, batch)).abs().mean().item()
    if difference <= TOLERANCE[model.compute_dtype]:
        return f"{share} (spot check: {difference:.1e} nats a token from a fresh computation)"
    cache.clear()
    return (
        f"{share}, but {difference:.1e} nats a token from a fresh computation: they are thrown away, and all"
        " will be computed again"
    )


def _check_longest(
    model: Model, objective: Objective, branches: Sequence[Branches], examples: int, budget: int
) -> str:
    """A forward and backward pass of the longest example; on a card also of the fullest micro-batch of a
    step.

    Raises PreflightError where the longest one does not fit; a fuller one may fail, training packs smaller.
    """
    way = model.way
    by_size = sorted(branches, key=lambda item: -cost([item], way))
    longest = by_size[0]
    batches = list(pack(by_size[:examples], budget, way))
    sizes = [cost([by_size[n] for n in batch.examples], way) for batch in batches]
    size, fullest = max(zip(sizes, batches, strict=True), key=lambda pair: pair[0])
    tokens = cost([longest], way)
    _forward_and_backward(model, objective, collate([longest], [0]))
    if model.device.type == "cpu" or len(fullest.examples) == 1:
        return f"the longest example ({tokens} tokens) fits"
    try:
        _forward_and_backward(model, objective, fullest)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return f"the longest example ({tokens} tokens) fits, a micro-batch of {size} tokens too"
    give_back_memory()
    return "a full micro-batch does not fit in memory; training will pack smaller ones"


def _check_evaluation(model: Model, objective: Objective, held_out: Sequence[Branches]) -> str:
    """The longest example that is held out runs through both roles without gradient."""
    longest = max(held_out, key=lambda item: cost([item], model.way))
    try:
        all_logprobs(model, objective, [longest], tokens_per_microbatch=1)
    except RunError as error:
        raise PreflightError(f"{error}, or hold out shorter rows") from error
    return f"the longest held-out example ({cost([longest], model.way)} tokens) fits"


def _forward_and_backward(model: Model, objective: Objective, batch: MicroBatch) -> None:
    objective(batch_logprobs(model, objective, batch.to(model.device))).per_example.sum().backward()
