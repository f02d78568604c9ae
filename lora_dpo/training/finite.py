"""Numbers that are none: known for each example within the step, named by file and row, and never saved.

Legend: `B` examples, `k` sides of an example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_dpo.errors import RunError
from lora_dpo.evaluation import places
from lora_dpo.model import Model
from lora_dpo.tokenization import Branches
from lora_dpo.training.step import BAD_LOSS, BAD_POLICY, BAD_REFERENCE, BAD_REWARDS, Step, accumulate

CAUSES = {
    BAD_POLICY: "the policy's log-probs are not finite",
    BAD_REWARDS: "the rewards are not finite",
    BAD_REFERENCE: "the reference's log-probs are not finite",
    BAD_LOSS: "the loss is not finite",
}
"""In words, what comes first in the forward pass first: it is why the others are not finite either."""


def step_flags(sums_flags: Tensor, process: int, processes: int, examples: int) -> Tensor:
    """One process's flags among those of the step's examples, of which process p of P has p, p + P, …:
    float64 [examples], 0 elsewhere. Summed over processes, every process knows all of them.
    """
    flags = torch.zeros(examples, dtype=torch.float64, device=sums_flags.device)
    flags[process::processes] = sums_flags
    return flags


def what_is_wrong(flags: Sequence[float], loss: float, branches: Sequence[Branches]) -> str | None:
    """In words what of a step isn't finite, and in which rows; None where all is. flags: of each example."""
    for bit, cause in CAUSES.items():
        bad = [item for flag, item in zip(flags, branches, strict=True) if int(flag) & bit]
        if bad:
            whole = "all of the step, " if len(bad) == len(branches) > 1 else ""
            return f"{cause} for {whole}{places(bad)}"
    return None if math.isfinite(loss) else f"the sum of finite losses is {loss}"


def wrong_gradient(bad: Sequence[Branches], examples: int) -> str:
    """The same for a gradient. bad: the examples whose own gradient isn't finite."""
    if bad:
        return f"the loss is finite, its gradient is not: that of {places(bad)} by itself is not either"
    return (
        f"the loss is finite, its gradient is not, though that of each of the step's {examples} examples by"
        " itself is: no single row does it"
    )


def with_bad_gradient(step: Step, budget: int) -> list[int]:
    """Which of a step's examples have a gradient of their own that isn't finite: each runs again alone, under
    the step's seed. Leaves no gradient, and nothing for the cache to keep.

    It takes about as long as the step with one example a micro-batch, and is for steps that have failed.
    """
    bad = []
    for n, item in enumerate(step.branches):
        _clear(step)
        torch.manual_seed(step.seed)
        accumulate(replace(step, branches=[item], gather=None), budget)
        gradients = [p.grad for p in step.model.trainable.values() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            bad.append(n)
    _clear(step)
    return bad


def _clear(step: Step) -> None:
    for parameter in step.model.trainable.values():
        parameter.grad = None
    if step.cache is not None:
        step.cache.drop_pending()


def advice(model: Model) -> str:
    """What to try when numbers are none."""
    wider = "" if model.compute_dtype == torch.float32 else ", or base.compute_dtype=float32"
    return (
        f"Try a lower training.learning_rate{wider}, look at these rows, or leave such steps out with"
        " training.on_bad_step=skip; --resume goes on from the last checkpoint"
    )


def not_finite_adapter(model: Model) -> str | None:
    """In words which tensors of the adapter hold what isn't a number; None where none does."""
    finite = torch.stack([torch.isfinite(p).all() for p in model.trainable.values()]).tolist()
    bad = [name for name, fine in zip(model.trainable, finite, strict=True) if not fine]
    more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    return f"the adapter itself is not finite in {bad[0]}{more}" if bad else None


def check_finite_adapter(model: Model) -> None:
    """Raise RunError, naming a tensor, where the adapter holds what isn't a number: it must not be saved."""
    wrong = not_finite_adapter(model)
    if wrong is not None:
        raise RunError(
            f"{wrong}: it is not saved, and earlier checkpoints are as they were. Begin again with a lower"
            " training.learning_rate"
        )


def finite_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers: others have no place in a file of JSON."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
