"""How good is it: preference accuracy and margin on held-out pairs, log-prob changes, lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch, Way, cost, halved, pack
from lora_dpo.errors import RunError
from lora_dpo.logprobs import (
    sequence_rewards,
    token_divergence,
    token_logprobs,
    token_logprobs_and_square_sums,
)
from lora_dpo.losses import LogProbs, Objective, TokenLogProbs, Totals, preferred, weighted
from lora_dpo.model import Model, as_policy, without_dropout
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.reference import ReferenceCache, reference_logprobs
from lora_dpo.tokenization import Branches

log = logging.getLogger(__name__)

BOOTSTRAP_SAMPLES = 2000

NAMED = 5
"""So many rows are named; of more there is a count."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval (percentiles of the means of resampled examples)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """Held-out results. metrics: name → mean with interval, over `examples` examples."""

    examples: int
    metrics: dict[str, Interval] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        return {name: interval.mean for name, interval in self.metrics.items()}


def evaluate(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    *,
    tokens_per_microbatch: int = 8192,
    progress: Callable[[int], None] | None = None,
    intervals: bool = True,
    cache: ReferenceCache | None = None,
    say: Callable[[str], None] = log.warning,
) -> Evaluation:
    """The objective's loss and metrics, and each side's log-probs and lengths, on these examples.

    `progress` is told how many examples each micro-batch had. Without `intervals` only the means are made.
    Reference log-probs are read from `cache`, and what it lacks is added to it. `say` is told in words which
    metrics aren't finite and for which rows, and when memory ran out and smaller micro-batches go on.
    Raises RunError, naming the row, where a single example does not fit.
    """
    logprobs = all_logprobs(
        model,
        objective,
        branches,
        tokens_per_microbatch=tokens_per_microbatch,
        progress=progress,
        cache=cache,
        say=say,
    )
    samples = BOOTSTRAP_SAMPLES if intervals else 0
    rows = _rows(objective, logprobs)
    wrong = describe_not_finite(rows, branches)
    if wrong:
        say(f"evaluation: {wrong}")
    return Evaluation(len(branches), {name: bootstrap(row, samples=samples) for name, row in rows.items()})


def metric_names(objective: Objective) -> set[str]:
    """The names that `evaluate` gives, and a recipe's best_metric may name."""
    zeros = torch.zeros(1, len(objective.sides), dtype=torch.float64)
    lengths = torch.ones(zeros.shape, dtype=torch.int64)
    one = torch.arange(zeros.numel())
    tokens = TokenLogProbs(zeros[0], zeros[0], one, 0 * one, zeros[0], zeros[0])
    reference = zeros if objective.needs.reference else None
    values = {name: torch.ones(1, dtype=torch.float64) for name in ("weight", "margin", "desirable")}
    return set(_rows(objective, LogProbs(zeros, reference, lengths, values, tokens)))


def _rows(objective: Objective, logprobs: LogProbs) -> dict[str, Tensor]:
    """Every metric of every example, name → [B]."""
    loss = objective(logprobs)
    rows = {"loss": weighted(loss, logprobs), **loss.metrics}
    if objective.records == "pairs" and not objective.needs.rewards:
        rows["logps/accuracy"] = preferred(*logprobs.policy.unbind(1))
    for side, name in enumerate(objective.sides):
        rows[f"tokens/{name}"] = logprobs.lengths[:, side]
    return rows


def describe_not_finite(rows: Mapping[str, Tensor], branches: Sequence[Branches]) -> str | None:
    """In words which metrics (name → [B]) aren't finite, and for which examples; None where all are."""
    flags = {name: ~values.isfinite() for name, values in rows.items()}
    bad = [name for name, flag in flags.items() if bool(flag.any())]
    if not bad:
        return None
    found = torch.stack([flags[name] for name in bad]).any(dim=0)
    return f"{', '.join(bad)} not finite for {places([branches[n] for n in found.nonzero()[:, 0].tolist()])}"


def places(branches: Sequence[Branches]) -> str:
    """Where these examples come from: a few by file and row, the others counted."""
    all_of_them = list(dict.fromkeys(str(item.where) for item in branches))
    more = len(all_of_them) - NAMED
    return ", ".join(all_of_them[:NAMED]) + (f" and {more} more" if more > 0 else "")


def all_logprobs(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    *,
    tokens_per_microbatch: int = 8192,
    progress: Callable[[int], None] | None = None,
    cache: ReferenceCache | None = None,
    say: Callable[[str], None] = log.warning,
) -> LogProbs:
    """Log-probs of these examples, in their order, on the CPU and without gradient.

    When memory runs out, those that are left go on with half the budget, and `say` is told. Raises RunError,
    naming the row, where a single example does not fit.
    """
    parts: list[LogProbs] = []
    order: list[int] = []

    def add(batch: MicroBatch, examples: list[int]) -> None:
        parts.append(batch_logprobs(model, objective, batch, cache).to("cpu"))
        order.extend(examples)

    each_microbatch(
        model, branches, add, tokens_per_microbatch=tokens_per_microbatch, progress=progress, say=say
    )
    if cache is not None:
        cache.commit()
    return LogProbs.joined(parts).reordered(order)


def each_microbatch(
    model: Model,
    branches: Sequence[Branches],
    act: Callable[[MicroBatch, list[int]], None],
    *,
    tokens_per_microbatch: int,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = log.warning,
) -> None:
    """Call `act` with each micro-batch of these, on the model's device, and with the numbers of its examples;
    without gradient or dropout.

    When memory runs out, those that are left go on with half the budget, and `say` is told. Raises RunError,
    naming the row, where a single example does not fit.
    """
    left, budget = list(range(len(branches))), tokens_per_microbatch
    while left:
        these = [branches[n] for n in left]
        done: list[int] = []
        try:
            with torch.no_grad(), without_dropout(model):
                for batch in pack(these, budget, model.way):
                    act(batch.to(model.device), [left[n] for n in batch.examples])
                    done += batch.examples
                    if progress is not None:
                        progress(len(batch.examples))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = halved(budget, these, model.way)
            if smaller is None:
                raise RunError(
                    f"evaluation: {does_not_fit(these, model.way)}: lower data.max_tokens"
                ) from error
            budget = smaller
        left = sorted(set(left) - {left[n] for n in done})
        if left:
            # Outside the handler: its traceback holds the failed forward's tensors.
            give_back_memory()
            say(f"out of memory while evaluating: it goes on with {budget} tokens a micro-batch")


def does_not_fit(branches: Sequence[Branches], way: Way) -> str:
    """Who does not fit in memory, where every example had a micro-batch of its own already."""
    longest = max(branches, key=lambda item: cost([item], way))
    return f"the longest example ({cost([longest], way)} tokens, {longest.where}) does not fit in memory"


def batch_logprobs(
    model: Model,
    objective: Objective,
    batch: MicroBatch,
    cache: ReferenceCache | None = None,
    *,
    totals: Totals | None = None,
    policy_only: bool = False,
) -> LogProbs:
    """What the objective needs of one micro-batch; policy log-probs and divergences are differentiable.

    The reference's log-probs come from `cache` where one is given; committing is the caller's. totals: of the
    step that the batch belongs to. policy_only: leave the reference out, though it is needed.
    An objective of rewards is given those in place of log-probs.
    """
    if objective.needs.rewards:
        return _batch_rewards(model, batch, totals)
    needs, reference, square_sum, divergence = objective.needs, None, None, None
    if needs.divergence:
        policy, divergence, reference, square_sum = token_divergence(model, batch)
    else:
        if needs.reference and not policy_only:
            reference = reference_logprobs(model, batch) if cache is None else cache.logprobs(model, batch)
        with as_policy(model):
            if needs.square_sum:
                policy, square_sum = token_logprobs_and_square_sums(model, batch)
            else:
                policy = token_logprobs(model, batch)
    tokens = None
    if needs.tokens:
        place = batch.places()
        tokens = TokenLogProbs(policy, reference, batch.sequences, place, square_sum, divergence)
    return LogProbs(
        policy=batch.per_sequence(policy),
        reference=batch.per_sequence(reference) if reference is not None and needs.reference else None,
        lengths=batch.scored_lengths(),
        values=batch.values,
        tokens=tokens,
        totals=totals,
    )


def _batch_rewards(model: Model, batch: MicroBatch, totals: Totals | None) -> LogProbs:
    with as_policy(model):
        rewards = sequence_rewards(model, batch).double()
    return LogProbs(rewards, None, batch.scored_lengths(), batch.values, totals=totals)


def bootstrap(values: Tensor, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> Interval:
    """The mean of values [B] and its 95% percentile interval over resampled examples (Efron 1979).

    With no samples the interval is the mean alone.
    """
    array = values.detach().to(torch.float64).numpy()
    if not samples:
        return Interval(float(array.mean()), float(array.mean()), float(array.mean()))
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
