"""The loop: one optimizer step after another, evaluated, checkpointed, resumable."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lora_dpo.batching import StepSampler
from lora_dpo.errors import RunError
from lora_dpo.evaluation import evaluate
from lora_dpo.losses import LogProbs
from lora_dpo.model import REFERENCE, Model, save_adapter, sync_reference
from lora_dpo.recipe import Recipe, to_dict
from lora_dpo.reference import ReferenceCache, reference_fingerprint
from lora_dpo.run_directory import RunDirectory, damage, write_folder
from lora_dpo.training.checkpoint import (
    TrainingState,
    data_fingerprint,
    restore_adapter,
    restore_checkpoint,
    restore_reference,
    save_checkpoint,
)
from lora_dpo.training.data import TrainingData
from lora_dpo.training.observers import Observer, Record, metrics_file, trackers
from lora_dpo.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from lora_dpo.training.preflight import preflight
from lora_dpo.training.progress import Display, duration
from lora_dpo.training.step import StepSums, step_gradient, step_seed, step_totals

SKIPS = 20
"""So many updates in a row may overflow under loss scaling; then the run is broken, not the scale."""


class Stopped(Exception):
    """The run was asked to stop, and has: its state is in a checkpoint. `code` is the exit status for it."""

    def __init__(self, signal_number: int, folder: Path):
        super().__init__(f"stopped; go on with --resume (last checkpoint: {folder})")
        self.code = 128 + signal_number


class Trainer:
    """Holds a run's model, optimizer and counters. `run()` trains to the end."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        model: Model,
        data: TrainingData,
        accelerator: Accelerator,
        display: Display,
        observers: Sequence[Observer] = (),
        cache: ReferenceCache | None = None,
    ):
        self.recipe, self.training, self.objective = recipe, recipe.training, recipe.loss
        self.run_directory, self.model, self.data = run, model, data
        self.accelerator, self.display, self.cache = accelerator, display, cache
        ratio = recipe.adapter.lora_plus_ratio
        self.optimizer = make_optimizer(self.training, model.trainable, lora_plus_ratio=ratio)
        self.scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            model.device.type, enabled=model.compute_dtype == torch.float16
        )
        if self.training.gradient_checkpointing != "none":
            offload = self.training.gradient_checkpointing == "offload"
            model.checkpoint_layers(offload=offload)
            if offload and not model.offloading:
                display.say("note: training.gradient_checkpointing=offload is the same as layers on the CPU")
        if len(data.train) < self.training.pairs_per_step:
            display.say(
                f"note: {len(data.train)} training examples are fewer than training.pairs_per_step"
                f" ({self.training.pairs_per_step}), so each step meets some of them more than once"
            )
        self.sampler = StepSampler(len(data.train), self.training.pairs_per_step, self.training.seed)
        steps = self.sampler.steps(self.training.epochs)
        self.steps = min(steps, self.training.max_steps or steps)
        self.state = TrainingState(
            tokens_per_microbatch=self.training.tokens_per_microbatch,
            data=data_fingerprint(data.train),
            reference=reference_fingerprint(model),
        )
        self.observers = [metrics_file(run), display.observe, *observers]
        if self.training.trackers:
            self.observers.insert(1, trackers(accelerator, "lora_dpo", to_dict(recipe)))
        self._signal: int | None = None
        self._stop: int | None = None
        self._saved: int | None = None
        self._started = (0, 0.0)

    def resume(self) -> None:
        """Take up the newest checkpoint that verifies. Raises RunError if the data or the reference changed
        since.
        """
        for folder in reversed(self.run_directory.checkpoints()):
            wrong = damage(folder)
            if wrong:
                self.display.say(f"passed over {folder.name}: {wrong}")
                continue
            state = restore_checkpoint(folder, self.model, self.optimizer)
            if state.data != self.state.data:
                raise RunError("--resume: the training data are not those that the run began with")
            if state.reference != self.state.reference:
                raise RunError(f"--resume: {changed_reference(self.recipe)}")
            # A smaller budget in the recipe counts, and so does one that was halved for want of memory.
            state.tokens_per_microbatch = min(state.tokens_per_microbatch, self.state.tokens_per_microbatch)
            self.state = state
            if self.scaler.is_enabled() and state.loss_scale:
                scale = {"scale": state.loss_scale, "_growth_tracker": state.loss_scale_growth}
                self.scaler.load_state_dict(self.scaler.state_dict() | scale)
            break
        else:
            if self.run_directory.checkpoints():
                raise RunError(f"--resume: no checkpoint in {self.run_directory.checkpoints_folder} is whole")
        if self.accelerator.is_main_process:
            self.run_directory.drop_records_after(self.state.step)
        self.display.say(f"resumed after step {self.state.step} of {self.steps}")

    def preflight(self) -> None:
        preflight(
            self.model,
            self.objective,
            self.data.train,
            examples_per_step=self.training.pairs_per_step,
            tokens_per_microbatch=self.state.tokens_per_microbatch,
            fresh_adapter=self.state.step == 0,
            cache=self.cache,
            held_out=self.data.eval,
            say=lambda line: self.display.say(f"preflight: {line}"),
        )

    def run(self) -> None:
        """Train to the last step, or until early stopping; then write the adapter."""
        self._started = (self.state.step, time.monotonic())
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        with self._signals(), self.display.training(self.state.step, self.steps):
            while self.state.step < self.steps and not self._stop_early():
                metrics = self.step()
                self._tell("step", metrics)
                self._evaluate_and_save()
                stop = self._signal if self.accelerator.num_processes == 1 else self._stop
                if stop is not None:
                    raise Stopped(stop, self._save())
        self._finish()

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics. Raises RunError where the loss or gradient isn't a
        number.
        """
        began = time.monotonic()
        examples = self.sampler.step(self.state.step)
        mine = examples[self.accelerator.process_index :: self.accelerator.num_processes]
        train = self.data.train
        sums = step_gradient(
            self.model,
            self.objective,
            [train[n] for n in mine],
            totals=step_totals([train[n] for n in examples]),
            tokens_per_microbatch=self.state.tokens_per_microbatch,
            seed=step_seed(self.training.seed, self.state.step, self.accelerator.process_index),
            # Not Accelerator.backward: it divides by the accumulation steps of the user's accelerate config.
            backward=lambda loss: self.scaler.scale(loss).backward(),
            cache=self.cache,
            state=self.state.objective,
            gather=self._gather if self.accelerator.num_processes > 1 else None,
        )
        self.state.tokens_per_microbatch = sums.tokens_per_microbatch
        metrics = self._means(sums, len(examples))
        if not math.isfinite(metrics["loss"]):
            raise self._not_a_number("loss", metrics["loss"])
        metrics["learning_rate"] = learning_rate(self.training, self.state.step, self.steps)
        set_learning_rate(self.optimizer, metrics["learning_rate"])
        metrics["grad_norm"] = self._update()
        if self.cache is not None:
            self.cache.commit()
        self.state.step += 1
        self.state.objective = {name: float(value) for name, value in sums.state.items()}
        self._sync_reference()
        return metrics | self._speed(metrics["tokens"], examples, began)

    def _gather(self, own: LogProbs) -> tuple[list[LogProbs], int]:
        """Every process's log-probs of the step, for objectives that look at all of it."""
        parts = [part.to(self.model.device) for part in gather_object([own.to("cpu")])]
        return parts, self.accelerator.process_index

    def _sync_reference(self) -> None:
        """Every reference.sync_every steps the reference becomes the policy. No cache is open then."""
        every = self.recipe.reference.sync_every
        if every and self.objective.needs_reference and self.state.step % every == 0:
            sync_reference(self.model)
            self.state.synced_at = self.state.step

    def _update(self) -> float:
        """Add up the processes' gradients, clip, step the optimizer; returns the norm before clipping.

        With loss scaling, an overflow skips the update and lowers the scale; the norm of that step is 0.
        """
        parameters = list(self.model.trainable.values())
        if self.accelerator.num_processes > 1:
            self._add_up([p.grad for p in parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm or math.inf).item()
        if math.isfinite(norm):
            self.state.skipped_in_a_row = 0
        elif self.scaler.is_enabled() and self.state.skipped_in_a_row < SKIPS:
            self.state.skipped_in_a_row += 1
            norm = 0.0
        else:
            raise self._not_a_number("gradient's norm", norm)
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

    def _not_a_number(self, what: str, value: float) -> RunError:
        return RunError(
            f"step {self.state.step + 1}: the {what} is {value}; nothing was updated. Try a lower"
            " training.learning_rate, or base.compute_dtype=float32"
        )

    def _means(self, sums: StepSums, examples: int) -> dict[str, float]:
        """The step's metrics over all processes, read back from the device in one piece."""
        names = sorted(sums.metrics)
        values = torch.stack([sums.loss.double(), *(sums.metrics[n].double() for n in names)])
        own = torch.tensor([sums.tokens, self._signal or 0], dtype=torch.float64, device=values.device)
        total = cast(torch.Tensor, self.accelerator.reduce(torch.cat([values, own]), "sum"))
        loss, *totals, tokens, stop = total.tolist()
        # All processes stop at the same step, whichever of them heard of the signal.
        self._stop = self._signal or (signal.SIGTERM if stop else None)
        means = {name: total / examples for name, total in zip(names, totals, strict=True)}
        return {"loss": loss, **means, "tokens": tokens}

    def _speed(self, tokens: float, examples: Sequence[int], began: float) -> dict[str, float]:
        seconds = max(time.monotonic() - began, 1e-9)
        first, start = self._started
        left = (time.monotonic() - start) / (self.state.step - first) * (self.steps - self.state.step)
        return {
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": len(examples) / seconds,
            "peak_memory_gib": peak_memory_gib(self.model.device),
            "tokens_per_microbatch": self.state.tokens_per_microbatch,
            "seconds": seconds,
            "seconds_left": left,
        }

    def _evaluate_and_save(self) -> None:
        step, last = self.state.step, self.state.step == self.steps
        better = False
        due = self.training.eval_every and step % self.training.eval_every == 0
        if self.data.eval and (due or last):
            better = self._evaluate()
        due = self.training.save_every and step % self.training.save_every == 0
        if due or last or better or self._stop_early():
            self._save()

    def _evaluate(self) -> bool:
        """Tell the observers the held-out metrics; True if the best metric so far is this one."""
        result = evaluate(
            self.model,
            self.objective,
            self.data.eval,
            tokens_per_microbatch=self.state.tokens_per_microbatch,
            intervals=False,
            cache=self.cache,
        ).means()
        self._tell("evaluation", {f"eval/{name}": value for name, value in result.items()})
        metric = self.training.best_metric
        if metric is None:
            return False
        # The main process decides: another's rounding must not make it save alone.
        value = broadcast_object_list([result[metric]])[0]
        best = self.state.best
        better = math.isfinite(value) and (
            best is None or (value < best if metric == "loss" else value > best)
        )
        if better:
            self.state.best, self.state.best_step = value, self.state.step
        self.state.evaluations_since_best = 0 if better else self.state.evaluations_since_best + 1
        return better

    def _stop_early(self) -> bool:
        patience = self.training.early_stopping
        return patience > 0 and self.state.evaluations_since_best >= patience

    def _tell(self, kind: str, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            record = Record(kind, self.state.step, self.steps, metrics)  # pyright: ignore[reportArgumentType]
            for observe in self.observers:
                observe(record)

    def _save(self) -> Path:
        folder = self.run_directory.checkpoint_folder(self.state.step)
        if self._saved == self.state.step:
            return folder
        self._saved = self.state.step
        if self.scaler.is_enabled():
            scale = self.scaler.state_dict()
            self.state.loss_scale, self.state.loss_scale_growth = scale["scale"], scale["_growth_tracker"]
        if self.accelerator.is_main_process:
            save_checkpoint(folder, self.model, self.optimizer, self.state)
            best = (
                self.run_directory.checkpoint_folder(self.state.best_step) if self.state.best_step else None
            )
            self.run_directory.forget_checkpoints(self.training.keep_checkpoints, best)
        self.accelerator.wait_for_everyone()
        return folder

    def _finish(self) -> None:
        """Write adapter/: the best checkpoint's where a metric chooses, else the last step's."""
        run, chosen = self.run_directory, self.state.best_step or self.state.step
        if chosen != self.state.step:
            restore_adapter(run.checkpoint_folder(chosen) / "adapter", self.model)
            restore_reference(run.checkpoint_folder(chosen), self.model)
            self.display.say(
                f"the best {self.training.best_metric} was at step {chosen}: that adapter is kept"
            )
        if self.accelerator.is_main_process:
            if self.model.reference_adapters:
                # With it the run is complete: what it started from may be moved or deleted.
                write_folder(run.reference_folder, lambda part: save_adapter(self.model, part, REFERENCE))
            write_folder(run.adapter_folder, lambda part: self._fill_adapter(part))
        self.accelerator.wait_for_everyone()
        if self.training.trackers:
            self.accelerator.end_training()
        took = duration(time.monotonic() - self._started[1])
        self.display.say(f"trained {self.state.step} steps in {took}; the adapter is in {run.adapter_folder}")

    def _fill_adapter(self, part: Path) -> None:
        save_adapter(self.model, part)
        self.data.tokenizer.save(part)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand; a second one ends it at once."""

        def ask(number: int, _: object) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number
            self.display.say("stopping after this step; once more stops at once")

        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, ask) for number in numbers]
        except ValueError:  # not in the main thread: the caller's program owns the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def changed_reference(recipe: Recipe) -> str:
    """What to tell whoever resumes a run on another reference than it began with."""
    folder = recipe.reference.adapter or recipe.adapter.start_from
    return (
        "the reference is not the one that the run began with"
        + (f": the adapter in {folder} was changed since" if folder else "")
        + ". Put it back, or begin a new run"
    )


def peak_memory_gib(device: torch.device) -> float:
    """CUDA: the most that tensors took so far. CPU: the most that the process had resident so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
