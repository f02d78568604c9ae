"""The gradient of one optimizer step, whatever it is packed into."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_dpo.batching import cost, pack
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.losses import Objective
from lora_dpo.model import Model
from lora_dpo.reference import ReferenceCache
from lora_dpo.tokenization import Branches
from lora_dpo.training.host_memory import give_back_freed

log = logging.getLogger(__name__)


@dataclass(eq=False)
class StepSums:
    """What a step adds up, as tensors on the device: nothing is read back before the step is done.

    loss: the sum of example losses over the step's count. metrics: sums over this process's examples.
    """

    examples: int
    tokens: int
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens_per_microbatch: int = 0


def step_gradient(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    *,
    count: float,
    tokens_per_microbatch: int,
    seed: int,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    cache: ReferenceCache | None = None,
) -> StepSums:
    """Accumulate the gradient of (Σ example losses) / count over these examples into the adapters.

    count: the divisor of the whole step, over all processes. seed: of the step's dropout. When memory runs
    out, the gradients are dropped, the RNG is rewound and the step repeated with half the budget: slower,
    and the same mathematics. Reference log-probs are read from `cache`; what it lacks awaits the caller's
    `cache.commit()`. Raises torch.OutOfMemoryError where a single example does not fit.
    """
    budget = tokens_per_microbatch
    while True:
        for parameter in model.trainable.values():
            parameter.grad = None
        if cache is not None:
            cache.drop_pending()
        torch.manual_seed(seed)
        try:
            return _accumulate(model, objective, branches, count, budget, backward, cache)
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


def _accumulate(
    model: Model,
    objective: Objective,
    branches: Sequence[Branches],
    count: float,
    budget: int,
    backward: Callable[[Tensor], None],
    cache: ReferenceCache | None,
) -> StepSums:
    tokens = sum(cost([item], model.way) for item in branches)
    sums = StepSums(len(branches), tokens, torch.zeros((), device=model.device), tokens_per_microbatch=budget)
    before = 0 if cache is None else cache.hits
    for batch in pack(branches, budget, model.way):
        loss = objective(batch_logprobs(model, objective, batch.to(model.device), cache))
        total = loss.per_example.sum() / count
        backward(total)
        sums.loss += total.detach()
        for name, values in loss.metrics.items():
            sums.metrics[name] = sums.metrics.get(name, 0) + values.sum()
        del batch, loss, total
        give_back_freed(model.device)
    if cache is not None:
        read = torch.full((), cache.hits - before, device=model.device)
        sums.metrics["reference_cache/hit_rate"] = read
    return sums


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """The RNG seed of a step: a function of the run's seed and the step's number, so a resumed run repeats
    it.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
