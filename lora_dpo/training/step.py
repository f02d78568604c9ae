"""The gradient of one optimizer step, whatever it is packed into."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_dpo.batching import cost, halved, pack, sent
from lora_dpo.errors import RunError
from lora_dpo.evaluation import batch_logprobs, does_not_fit
from lora_dpo.losses import LogProbs, Loss, Objective, Totals, weighted
from lora_dpo.model import Model
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.reference import ReferenceCache
from lora_dpo.tokenization import Branches
from lora_dpo.training.host_memory import give_back_freed

log = logging.getLogger(__name__)

Gather = Callable[[LogProbs], tuple[Sequence[LogProbs], int]]

BAD_POLICY, BAD_REFERENCE, BAD_LOSS, BAD_REWARDS = 1, 2, 4, 8
"""What of an example may not be finite; its flag is the sum of these."""

SMALLER = "lower data.max_tokens, or set training.gradient_checkpointing=offload"
"""What to do where a single example is too long for the memory there is."""


@dataclass(eq=False)
class StepSums:
    """What a step adds up, as tensors on the device: nothing is read back before the step is done.

    step: what was run. loss: the sum of example losses over the step's examples. metrics: sums over this
    process's examples. flags: of each of them in their order, 0 where log-probs (or rewards) and loss are
    finite, else the sum of BAD_…, float64 [examples]. state: what the objective hands to the
    next step. out_of_memory_retries: how often the step began again with a smaller budget.
    """

    step: Step
    tokens: int
    loss: Tensor
    flags: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens_per_microbatch: int = 0
    state: Mapping[str, float | Tensor] = field(default_factory=dict)
    out_of_memory_retries: int = 0

    @property
    def examples(self) -> int:
        return len(self.step.branches)


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
    say: Callable[[str], None] = log.warning,
) -> StepSums:
    """Accumulate the gradient of (Σ example losses) / examples over these examples into the adapters.

    totals: of the whole step, over all processes; by itself, these examples are the step. seed: of the step's
    dropout. When memory runs out, the gradients are dropped, the RNG is rewound and the step repeated with
    half the budget: slower, and the same mathematics; `say` is told. Reference log-probs are read from
    `cache`; what it lacks awaits the caller's `cache.commit()`. state: what the objective returned after the
    last step. gather: for a step over several processes, own log-probs → (those of every process, which are
    the own).
    Raises RunError, naming the row, where a single example does not fit.
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
        None if gather is None else _once(gather),
    )
    budget, retries = tokens_per_microbatch, 0
    counts = (0, 0) if cache is None else (cache.hits, cache.misses)
    while True:
        _begin(step, counts)
        try:
            sums = accumulate(step, budget)
            sums.out_of_memory_retries = retries
            return sums
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = halved(budget, branches, model.way)
            if smaller is None:
                raise RunError(f"{does_not_fit(branches, model.way)}; {SMALLER}") from error
        budget, retries = smaller, retries + 1
        # Outside the handler: its traceback holds the failed forward's activations.
        give_back_memory()
        say(f"out of memory: this step begins again, from now on with {budget} tokens a micro-batch")


def _begin(step: Step, counts: tuple[int, int]) -> None:
    """Nothing is left of an attempt before this one. counts: the cache's hits and misses before the step."""
    for parameter in step.model.trainable.values():
        parameter.grad = None
    if step.cache is not None:
        step.cache.drop_pending()
        step.cache.hits, step.cache.misses = counts
    torch.manual_seed(step.seed)


def _once(gather: Gather) -> Gather:
    """Processes meet once a step: one that begins it again has the others' log-probs, and renews its own."""
    kept: list[tuple[Sequence[LogProbs], int]] = []

    def gathered(own: LogProbs) -> tuple[Sequence[LogProbs], int]:
        if not kept:
            kept.append(gather(own))
            return kept[0]
        parts, mine = kept[0]
        return [own if n == mine else part for n, part in enumerate(parts)], mine

    return gathered


def step_totals(branches: Sequence[Branches]) -> Totals:
    """How many examples, and scored tokens of each side, make up a step of these."""
    sides = range(branches[0].sides if branches else 0)
    return Totals(len(branches), tuple(sum(item.scored_count(n) for item in branches) for n in sides))


def accumulate(step: Step, budget: int) -> StepSums:
    """One attempt at `step_gradient`, in micro-batches of so many tokens."""
    model, cache = step.model, step.cache
    tokens = sum(cost([item], model.way) for item in step.branches)
    zeros = torch.zeros(len(step.branches), device=model.device, dtype=torch.float64)
    sums = StepSums(step, tokens, zeros.new_zeros(()), zeros, tokens_per_microbatch=budget)
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
        per_example = weighted(loss, logprobs)
        total = per_example.sum() / step.totals.examples
        step.backward(total)
        _add(sums, loss, total.detach())
        places = sent(torch.tensor(batch.examples), model.device)
        sums.flags.index_copy_(0, places, _flags(step, logprobs, per_example))
        del batch, logprobs, loss, per_example, total
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
    sums.flags.copy_(_flags(step, own, per_example[rows]))
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


def _flags(step: Step, logprobs: LogProbs, per_example: Tensor) -> Tensor:
    """What of each example isn't finite, as a sum of BAD_…: float64 [B]. It waits for nothing."""
    flags = BAD_LOSS * (~per_example.detach().isfinite()).double()
    policy = BAD_REWARDS if step.objective.needs.rewards else BAD_POLICY
    flags += policy * (~logprobs.policy.detach().isfinite()).any(dim=1)
    if logprobs.reference is not None:
        flags += BAD_REFERENCE * (~logprobs.reference.isfinite()).any(dim=1)
    return flags


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """The RNG seed of a step: a function of the run's seed and the step's number, so a resumed run repeats
    it.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
