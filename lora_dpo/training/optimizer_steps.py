"""One optimizer step: the gradient, over all processes; the update, or why there is none; the metrics."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_dpo.errors import RunError
from lora_dpo.losses import LogProbs
from lora_dpo.model import Model, sync_reference
from lora_dpo.recipe import Recipe
from lora_dpo.reference import ReferenceCache
from lora_dpo.tokenization import Branches
from lora_dpo.training.checkpoint import TrainingState
from lora_dpo.training.finite import (
    advice,
    finite_only,
    not_finite_adapter,
    step_flags,
    what_is_wrong,
    with_bad_gradient,
    wrong_gradient,
)
from lora_dpo.training.optimizer import make_optimizer, set_learning_rate, whole_update
from lora_dpo.training.progress import Display
from lora_dpo.training.step import StepSums, step_gradient, step_seed, step_totals

SKIPS = 20
"""So many updates in a row may overflow under loss scaling, and so many steps in a row be left out with
training.on_bad_step=skip; then the run is broken, not the scale, or the rows.
"""


class OptimizerSteps:
    """Holds the optimizer and the loss scale of a run.

    stop: the signal that some process was sent, known to all of them after each step; else None.
    untouched: whether what a step raised left adapter and optimizer as they were, in every process.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        accelerator: Accelerator,
        display: Display,
        cache: ReferenceCache | None = None,
    ):
        self.recipe, self.training, self.objective = recipe, recipe.training, recipe.loss
        self.model, self.accelerator, self.display, self.cache = model, accelerator, display, cache
        ratio = recipe.adapter.lora_plus_ratio
        self.optimizer = make_optimizer(self.training, model.trainable, lora_plus_ratio=ratio)
        self.scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            model.device.type, enabled=model.compute_dtype == torch.float16
        )
        self.stop: int | None = None
        self.untouched = False

    def step(
        self, state: TrainingState, examples: Sequence[Branches], rate: float, asked: Callable[[], int | None]
    ) -> dict[str, float]:
        """Take a step over these examples, of all processes, and count it; returns its metrics.

        rate: the learning rate. asked: gives the signal that this process was sent. Raises RunError where
        the loss or gradient isn't a number, unless such steps are left out.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.untouched = self.alone
        sums = step_gradient(
            self.model,
            self.objective,
            examples[process::processes],
            totals=step_totals(examples),
            tokens_per_microbatch=state.tokens_per_microbatch,
            seed=step_seed(self.training.seed, state.step, process),
            # Not Accelerator.backward: it divides by the accumulation steps of the user's accelerate config.
            backward=lambda loss: self.scaler.scale(loss).backward(),
            cache=self.cache,
            state=state.objective,
            gather=None if self.alone else self._gather,
            say=self.display.say,
        )
        state.tokens_per_microbatch = sums.tokens_per_microbatch
        metrics, flags = self._means(sums, len(examples), asked())
        self.untouched = True  # all of them find the same wrong
        metrics["learning_rate"] = rate
        set_learning_rate(self.optimizer, rate)
        wrong = what_is_wrong(flags, metrics["loss"], examples)
        if wrong is None:
            norm = self._update(state)
            if norm is None:
                wrong = self._why_no_gradient(state, sums, len(examples))
            else:
                metrics["grad_norm"] = norm
        if wrong is None:
            if self.cache is not None:
                self.cache.commit()
            state.objective = {name: float(value) for name, value in sums.state.items()}
        else:
            self._leave_out(state, wrong)
            metrics = finite_only(metrics)
        state.step += 1
        self._sync_reference(state)
        return metrics | {
            "skipped_steps": state.skipped_steps,
            "tokens_per_microbatch": state.tokens_per_microbatch,
        }

    @property
    def alone(self) -> bool:
        """Whether this is the only process of the run."""
        return self.accelerator.num_processes == 1

    def _gather(self, own: LogProbs) -> tuple[list[LogProbs], int]:
        """Every process's log-probs of the step, for objectives that look at all of it."""
        parts = [part.to(self.model.device) for part in gather_object([own.to("cpu")])]
        return parts, self.accelerator.process_index

    def _sync_reference(self, state: TrainingState) -> None:
        """Every reference.sync_every steps the reference becomes the policy. No cache is open then."""
        every = self.recipe.reference.sync_every
        if every and self.objective.needs_reference and state.step % every == 0:
            sync_reference(self.model)
            state.synced_at = state.step

    def _leave_out(self, state: TrainingState, wrong: str) -> None:
        """Drop all that came of this step, adapter and optimizer stay as they were. Raises RunError where the
        recipe doesn't leave such steps out, or nothing else would follow.
        """
        number = state.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.cache is not None:
            self.cache.drop_pending()
        broken = not_finite_adapter(self.model)
        if broken is not None:
            raise RunError(
                f"step {number}: {broken}, so {wrong}; nothing was saved since. {advice(self.model)}"
            )
        if self.training.on_bad_step == "stop":
            raise RunError(f"step {number}: {wrong}; nothing was updated. {advice(self.model)}")
        if state.skipped_in_a_row >= SKIPS:
            raise RunError(f"step {number}: {wrong}, after {SKIPS} such steps in a row. {advice(self.model)}")
        state.skipped_in_a_row += 1
        state.skipped_steps += 1
        self.display.say(f"step {number} is left out ({state.skipped_steps} so far): {wrong}")

    def _why_no_gradient(self, state: TrainingState, sums: StepSums, examples: int) -> str:
        self.display.say(f"step {state.step + 1}: looking for the rows whose gradient is not finite")
        bad = [sums.step.branches[n] for n in with_bad_gradient(sums.step, sums.tokens_per_microbatch)]
        return wrong_gradient(bad if self.alone else gather_object(bad), examples)

    def _update(self, state: TrainingState) -> float | None:
        """Add up the processes' gradients, clip, step the optimizer; returns the norm before clipping, None
        where it isn't finite and nothing was updated.

        With loss scaling, an overflow skips the update and lowers the scale; the norm of that step is 0.
        """
        parameters = list(self.model.trainable.values())
        if not self.alone:
            self._add_up([p.grad for p in parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm or math.inf).item()
        if math.isfinite(norm):
            state.skipped_in_a_row = 0
        elif self.scaler.is_enabled() and state.skipped_in_a_row < SKIPS:
            state.skipped_in_a_row += 1
            norm = 0.0
        else:
            return None
        self.untouched = False
        with whole_update():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _add_up(self, gradients: list[torch.Tensor]) -> None:
        """Sum the gradients over processes, in place, by one all-reduce."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = cast(torch.Tensor, self.accelerator.reduce(flat, "sum"))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def _means(
        self, sums: StepSums, examples: int, asked: int | None
    ) -> tuple[dict[str, float], list[float]]:
        """The step's metrics over all processes, and the flags of its examples, read back from the device in
        one piece.
        """
        names = sorted(sums.metrics)
        values = torch.stack([sums.loss.double(), *(sums.metrics[n].double() for n in names)])
        own = [sums.tokens, sums.out_of_memory_retries, asked or 0]
        own = torch.tensor(own, dtype=torch.float64, device=values.device)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        flags = step_flags(sums.flags, process, processes, examples)
        total = cast(torch.Tensor, self.accelerator.reduce(torch.cat([flags, values, own]), "sum")).tolist()
        loss, *totals, tokens, retries, stop = total[examples:]
        # All processes stop at the same step, whichever of them heard of the signal.
        self.stop = (asked or signal.SIGTERM) if stop else None
        means = {name: total / examples for name, total in zip(names, totals, strict=True)}
        metrics = {"loss": loss, **means, "tokens": tokens, "out_of_memory_retries": retries}
        return metrics, total[:examples]
