"""The gradient of one optimizer step, whatever it is packed into."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_dpo.batching import cost, pack
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.losses import LogProbs, Loss, Objective, Totals, weighted
from lora_dpo.model import Model
from lora_dpo.reference import ReferenceCache
from lora_dpo.tokenization import Branches
from lora_dpo.training.host_memory import give_back_freed

log = logging.getLogger(__name__)

Gather = Callable[[LogProbs], tuple[Sequence[LogProbs], int]]


@dataclass(eq=False)
class StepSums:
    """What a step adds up, as tensors on the device: nothing is read back before the step is done.

    loss: the sum of example losses over the step's examples. metrics: sums over this process's examples.
    state: what the objective hands to the next step.
    """

    examples: int
    tokens: int
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens_per_microbatch: int = 0
    state: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a step is made of; see `step_gradient`."""

    model: Model
    objective: Objective
    branches: Sequence[Branches]
    totals: Totals
    seed: int
    backward: Callable[[Tensor], None]
    cache: ReferenceCache | None
    state: Mapping[str, float]
    gather: Gather | None


def step_gradient(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    *,
    tokens_per_microbatch: int,
    seed: int,
    totals: Totals | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    cache: ReferenceCache | None = None,
    state: Mapping[str, float] | None = None,
    gather: Gather | None = None,
) -> StepSums:
    """Accumulate the gradient of (Σ example losses) / examples over these examples into the adapters.

    totals: of the whole step, over all processes; by itself, these examples are the step. seed: of the step's
    dropout. When memory runs out, the gradients are dropped, the RNG is rewound and the step repeated with
    half the budget: slower, and the same mathematics. Reference log-probs are read from `cache`; what it
    lacks awaits the caller's `cache.commit()`. state: what the objective returned after the last step.
    gather: for a step over several processes, own log-probs → (those of every process, which are the own).
    Raises torch.OutOfMemoryError where a single example does not fit.
    """
    step = Step(
        model,
        objective,
        branches,
        totals or step_totals(branches),
        seed,
        backward,
        cache,
        state or {},
        gather,
    )
    budget = tokens_per_microbatch
    while True:
        for parameter in model.trainable.values():
            parameter.grad = None
        if cache is not None:
            cache.drop_pending()
        torch.manual_seed(seed)
        try:
            return _accumulate(step, budget)
        except torch.OutOfMemoryError:
            longest = max(cost([item], model.way) for item in branches)
            if budget <= longest:
                raise
            budget = max(longest, min(budget, cost(branches, model.way)) // 2)
        # Outside the handler: its traceback holds the failed forward's activations.
        log.warning("out of memory: packing again with %d tokens a micro-batch", budget)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step_totals(branches: Sequence[Branches]) -> Totals:
    """How many examples, and scored tokens of each side, make up a step of these."""
    sides = range(branches[0].sides if branches else 0)
    return Totals(len(branches), tuple(sum(item.scored_count(n) for item in branches) for n in sides))


def _accumulate(step: Step, budget: int) -> StepSums:
    model, cache = step.model, step.cache
    tokens = sum(cost([item], model.way) for item in step.branches)
    loss = torch.zeros((), device=model.device, dtype=torch.float64)
    sums = StepSums(len(step.branches), tokens, loss, tokens_per_microbatch=budget)
    before = 0 if cache is None else cache.hits
    if step.objective.needs.whole_step:
        _whole_step(step, budget, sums)
    else:
        _by_microbatch(step, budget, sums)
    if cache is not None:
        read = torch.full((), cache.hits - before, device=model.device)
        sums.metrics["reference_cache/hit_rate"] = read
    return sums


def _by_microbatch(step: Step, budget: int, sums: StepSums) -> None:
    """Each micro-batch forward, its losses, and backward."""
    model = step.model
    for batch in pack(step.branches, budget, model.way):
        batch = batch.to(model.device)
        logprobs = batch_logprobs(model, step.objective, batch, step.cache, totals=step.totals)
        loss = step.objective(logprobs)
        total = weighted(loss, logprobs).sum() / step.totals.examples
        step.backward(total)
        _add(sums, loss, total.detach())
        del batch, logprobs, loss, total
        give_back_freed(model.device)


def _whole_step(step: Step, budget: int, sums: StepSums) -> None:
    """Log-probs of every micro-batch without gradient; the loss of the whole step and its gradient by them;
    then each micro-batch again, its log-probs times their gradients, backward.
    """
    own = _without_gradient(step, budget)
    parts, mine = ([own], 0) if step.gather is None else step.gather(own)
    leaves, wanted = replace(_interleaved(parts), state=step.state).differentiable()
    loss = step.objective(leaves)
    per_example = weighted(loss, leaves)
    found = torch.autograd.grad(
        per_example.sum() / step.totals.examples, list(wanted.values()), allow_unused=True
    )
    rows = slice(mine, None, len(parts))
    metrics = {name: values[rows] for name, values in loss.metrics.items()}
    total = per_example[rows].sum().detach() / step.totals.examples
    _add(sums, Loss(per_example, metrics, loss.state), total)
    tokens = slice(0)
    if own.tokens is not None:
        start = sum(len(part.by_token.policy) for part in parts[:mine])
        tokens = slice(start, start + len(own.by_token.policy))
    slopes = {
        name: slope[rows if name == "policy" else tokens]
        for name, slope in zip(wanted, found, strict=True)
        if slope is not None
    }
    # Rewound, so that both passes see the same dropout.
    torch.manual_seed(step.seed)
    _replay(step, budget, slopes)


def _without_gradient(step: Step, budget: int) -> LogProbs:
    """The own examples' log-probs, in their order; tokens in the order of micro-batches."""
    parts, order = [], []
    with torch.no_grad():
        for batch in pack(step.branches, budget, step.model.way):
            batch = batch.to(step.model.device)
            parts.append(batch_logprobs(step.model, step.objective, batch, step.cache, totals=step.totals))
            order += batch.examples
            del batch
            give_back_freed(step.model.device)
    return LogProbs.joined(parts).reordered(order)


def _interleaved(parts: Sequence[LogProbs]) -> LogProbs:
    """The whole step's, from each process's: process p of P has the examples p, p + P, …"""
    places = [n * len(parts) + p for p, part in enumerate(parts) for n in range(len(part.lengths))]
    return LogProbs.joined(parts).reordered(places)


def _sides_again(step: Step) -> tuple[int, ...] | None:
    """The sides that run again; all (None) where fewer would see another dropout or other tokens."""
    layers = step.model.adapter_layers
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for layer in layers for m in layer.modules())
    needs = step.objective.needs
    return None if dropout or needs.tokens else needs.trained_sides


def _replay(step: Step, budget: int, slopes: Mapping[str, Tensor]) -> None:
    """Backward through every micro-batch, from the gradients by its log-probs.

    slopes: "policy" [examples, sides], and where the objective looks at tokens "tokens.policy" and
    "tokens.divergence", one for each score row in the order of the first pass.
    """
    model, sides = step.model, _sides_again(step)
    branches = step.branches if sides is None else [item.only(sides) for item in step.branches]
    start = 0
    for batch in pack(branches, budget, model.way):
        logprobs = batch_logprobs(model, step.objective, batch.to(model.device), policy_only=True)
        total = torch.zeros((), device=model.device, dtype=torch.float64)
        if "policy" in slopes:
            of_sides = slopes["policy"][list(batch.examples)]
            total = (
                total + (logprobs.policy * (of_sides if sides is None else of_sides[:, list(sides)])).sum()
            )
        for name in ("policy", "divergence"):
            if f"tokens.{name}" in slopes:
                rows = slopes[f"tokens.{name}"][start : start + len(batch.targets)]
                total = total + (getattr(logprobs.by_token, name) * rows).sum()
        start += len(batch.targets)
        step.backward(total)
        del batch, logprobs, total
        give_back_freed(model.device)


def _add(sums: StepSums, loss: Loss, total: Tensor) -> None:
    sums.loss += total
    for name, values in loss.metrics.items():
        sums.metrics[name] = sums.metrics.get(name, 0) + values.sum()
    sums.state = loss.state


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """The RNG seed of a step: a function of the run's seed and the step's number, so a resumed run repeats
    it.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
