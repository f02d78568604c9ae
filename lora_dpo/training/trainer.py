"""The loop: one optimizer step after another, evaluated, checkpointed, resumable."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_dpo.batching import StepSampler
from lora_dpo.errors import RunError
from lora_dpo.evaluation import evaluate
from lora_dpo.model import Model, TrainedOn
from lora_dpo.recipe import Recipe, to_dict, to_yaml
from lora_dpo.reference import ReferenceCache, base_fingerprint, reference_fingerprint
from lora_dpo.run_directory import RunDirectory, need_space
from lora_dpo.stopping import Interrupted, Stopped, Stops
from lora_dpo.training.checkpoint import (
    Origin,
    TrainingState,
    checkpoint_size,
    data_fingerprint,
    example_hashes,
    restore_checkpoint,
    save_checkpoint,
)
from lora_dpo.training.data import TrainingData
from lora_dpo.training.ending import keep_best, write_adapters
from lora_dpo.training.finite import check_finite_adapter, finite_only, not_finite_adapter
from lora_dpo.training.keeping import Checkpoints, most_to_come
from lora_dpo.training.observers import Observer, Record, metrics_file, trackers
from lora_dpo.training.optimizer import learning_rate
from lora_dpo.training.optimizer_steps import OptimizerSteps
from lora_dpo.training.preflight import preflight
from lora_dpo.training.progress import Display, duration
from lora_dpo.training.resuming import checkpoint_differences, go_on, refuse, versions
from lora_dpo.training.shift_meter import ShiftMeter
from lora_dpo.training.speed import Speed
from lora_dpo.training.watch import Watch


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
        *,
        stops: Stops | None = None,
        checkpoints: Checkpoints | None = None,
        base: str | None = None,
        record: TrainedOn | None = None,
    ):
        """base: the base's fingerprint, where it is known. record: what is written beside the adapter."""
        self.recipe, self.training, self.objective = recipe, recipe.training, recipe.loss
        self.run_directory, self.model, self.data = run, model, data
        self.accelerator, self.display, self.cache, self.record = accelerator, display, cache, record
        self.updates = OptimizerSteps(recipe, model, accelerator, display, cache)
        self.optimizer, self.scaler = self.updates.optimizer, self.updates.scaler
        self._checkpoint_layers()
        self._say_if_few()
        self.sampler = StepSampler(len(data.train), self.training.pairs_per_step, self.training.seed)
        steps = self.sampler.steps(self.training.epochs)
        self.steps = min(steps, self.training.max_steps or steps)
        self.state = TrainingState(
            tokens_per_microbatch=self.training.tokens_per_microbatch,
            data=data_fingerprint(data.train),
            held_out=data_fingerprint(data.eval),
            base=base or base_fingerprint(model),
            reference=reference_fingerprint(model),
            versions=versions(model),
        )
        examples = {"train": example_hashes(data.train), "held_out": example_hashes(data.eval)}
        synced = bool(recipe.reference.sync_every and recipe.loss.needs_reference)
        self.origin = Origin(to_yaml(recipe), examples, synced)
        self.stops = stops or Stops()
        self.checkpoints = checkpoints or Checkpoints(run, self.training.keep_checkpoints)
        self.speed = Speed(0, self.steps, model.device)
        self.watch = Watch()
        self.shift = ShiftMeter(recipe, model, data, display.say)
        self.observers = [metrics_file(run), display.observe, *observers]
        if self.training.trackers:
            self.observers.insert(1, trackers(accelerator, "lora_dpo", to_dict(recipe), display.say))
        self._saved: TrainingState | None = None
        # Whether adapter, optimizer and counters are those of the same step, and none is being written.
        self._settled = True

    def _checkpoint_layers(self) -> None:
        if self.training.gradient_checkpointing != "none":
            offload = self.training.gradient_checkpointing == "offload"
            self.model.checkpoint_layers(offload=offload)
            if offload and not self.model.offloading:
                self.display.say(
                    "note: training.gradient_checkpointing=offload is the same as layers on the CPU"
                )

    def _say_if_few(self) -> None:
        count, wanted = len(self.data.train), self.training.pairs_per_step
        if count < wanted:
            self.display.say(
                f"note: {count} training examples are fewer than training.pairs_per_step ({wanted}), so each"
                " step meets some of them more than once"
            )

    def resume(self, folder: Path | None, accept: Sequence[str] = ()) -> None:
        """Go on from a whole checkpoint; from the first step where there is none.

        accept: what may differ from the run that began: keys or sections of the recipe, data, base,
        reference. Raises RunError for every other difference.
        """
        if folder is not None:
            then = restore_checkpoint(folder, self.model, self.optimizer)
            differ = refuse(
                list(checkpoint_differences(folder, self.recipe, then, self.state, self.data)), accept
            )
            go_on(then, self.state, differ, self.display.say)
            self.state = then
            self.watch.restore(then.watch)
            self.shift.fading.restore(then.shift)
            self._saved = None if differ else copy.deepcopy(then)
            if self.scaler.is_enabled() and then.loss_scale:
                scale = {"scale": then.loss_scale, "_growth_tracker": then.loss_scale_growth}
                self.scaler.load_state_dict(self.scaler.state_dict() | scale)
        if self.accelerator.is_main_process:
            evaluated = self.state.evaluated == self.state.step > 0
            lost = self.run_directory.drop_records_after(self.state.step, evaluated=evaluated)
            if lost:
                self.display.say(
                    f"note: metrics.jsonl is damaged in line {lost[0]}: it and its like are gone"
                )
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
            optimizer=self.optimizer,
            say=lambda line: self.display.say(f"preflight: {line}"),
        )

    def check_space(self) -> None:
        """Raise RunError where the checkpoints that will be kept don't fit on the disk."""
        if self.accelerator.is_main_process:
            size = checkpoint_size(self.model, self.origin)
            there = len(self.run_directory.checkpoints())
            count = most_to_come(self.training, self.steps - self.state.step, there)
            need_space(self.run_directory.path, count * size, f"the run ({count} checkpoints)")

    def run(self) -> None:
        """Train to the last step, or until early stopping; then write the adapter. Raises Stopped."""
        self.speed = Speed(self.state.step, self.steps, self.model.device)
        with self.display.training(self.state.step, self.steps):
            try:
                # Several processes stop where all of them know of it, after a step.
                with nullcontext() if self.updates.alone else self.stops.held():
                    self._loop()
            except Interrupted as stop:
                # Of several processes only what all agreed on may be waited for.
                agreed = self.updates.alone or self.updates.stop is not None
                if self._settled and agreed and self.state.step:  # before the first there is nothing to keep
                    self._save()
                raise Stopped(stop.number, self.checkpoints.newest_written()) from None

    def _loop(self) -> None:
        if not self.state.step:
            self._begin()
        elif self._look_due():
            self._evaluate_and_save()  # the run was stopped before, or during, this evaluation
        while self.state.step < self.steps and not self._stop_early():
            with self.stops.held():
                self._settled = False
                metrics = self._step_or_save()
                self._tell("step", metrics)
                for line in self.watch.step(metrics):
                    self.display.say(line)
                self.state.watch = self.watch.state()
                self._settled = True
            stop = self.stops.asked if self.updates.alone else self.updates.stop
            if stop is not None:
                raise Interrupted(stop)
            self._evaluate_and_save()
            if self.updates.alone:
                self.stops.check()
        with self.stops.held():
            self._finish()
        if self.updates.alone:
            self.stops.check()

    def _begin(self) -> None:
        """What later measurements of shift are compared with; its time is none of the steps'."""
        shift = self._measure_shift()
        with self.stops.held():
            self._take({}, shift)
        self.speed = Speed(0, self.steps, self.model.device)

    def _step_or_save(self) -> dict[str, float]:
        """A step. One that is refused before its update costs none of those before it."""
        try:
            return self.step()
        except RunError:
            if self.updates.untouched and self.state.step and not_finite_adapter(self.model) is None:
                with contextlib.suppress(RunError):  # what is wrong with the step is what must be heard
                    self._save()
            raise

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics. See `OptimizerSteps.step`."""
        began = time.monotonic()
        examples = [self.data.train[n] for n in self.sampler.step(self.state.step)]
        rate = learning_rate(self.training, self.state.step, self.steps)
        metrics = self.updates.step(self.state, examples, rate, lambda: self.stops.asked)
        speed = self.speed.metrics(
            self.state.step, tokens=metrics["tokens"], examples=len(examples), began=began
        )
        return metrics | speed

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.training.eval_every
        return bool(self.data.eval) and (step == self.steps or bool(every and step % every == 0))

    def _shift_due(self) -> bool:
        return self.shift.due(self.state.step, self.steps, self._evaluation_due())

    def _look_due(self) -> bool:
        """Whether something is to be measured after this step, and has not been."""
        return self.state.evaluated != self.state.step and (self._evaluation_due() or self._shift_due())

    def _evaluate_and_save(self) -> None:
        step, last = self.state.step, self.state.step == self.steps
        better = False
        if self._look_due():
            # A signal breaks it off, where this is the only process: it is done again after --resume.
            result = self._evaluate() if self._evaluation_due() else {}
            shift = self._measure_shift() if self._shift_due() else {}
            with self.stops.held():
                better = self._take(result, shift)
        due = self.training.save_every and step % self.training.save_every == 0
        if due or last or better or self._stop_early():
            self._save()

    def _evaluate(self) -> dict[str, float]:
        return evaluate(
            self.model,
            self.objective,
            self.data.eval,
            tokens_per_microbatch=self.state.tokens_per_microbatch,
            intervals=False,
            cache=self.cache,
            say=self._say_here,
        ).means()

    def _measure_shift(self) -> dict[str, float]:
        return self.shift.measure(self.state.tokens_per_microbatch, self._say_here)

    def _say_here(self, line: str) -> None:
        self.display.say(f"step {self.state.step}: {line}")

    def _take(self, result: dict[str, float], shift: dict[str, float]) -> bool:
        """Tell the observers what was measured; True if the best metric so far is this one."""
        told = {f"eval/{name}": value for name, value in result.items()} | shift
        if told:
            self._tell("evaluation" if result else "shift", finite_only(told))
        for line in self.shift.taken(shift):
            self.display.say(line)
        self.state.evaluated, self.state.shift = self.state.step, self.shift.fading.state()
        metric = self.training.best_metric
        if metric is None or not result:
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

    def _save(self) -> None:
        """A checkpoint of this step, unless the newest one is."""
        if self.scaler.is_enabled():
            scale = self.scaler.state_dict()
            self.state.loss_scale, self.state.loss_scale_growth = scale["scale"], scale["_growth_tracker"]
        if self._saved == self.state:
            return
        with self.stops.held():
            self._settled = False
            check_finite_adapter(self.model)
            if self.accelerator.is_main_process:
                self._write_checkpoint()
            self.accelerator.wait_for_everyone()
            self._saved, self._settled = copy.deepcopy(self.state), True

    def _write_checkpoint(self) -> None:
        run, best_step = self.run_directory, self.state.best_step
        folder = run.checkpoint_folder(self.state.step)
        need_space(run.path, checkpoint_size(self.model, self.origin), f"checkpoint {folder.name}")
        run.sync_records()
        save_checkpoint(folder, self.model, self.optimizer, self.state, self.origin)
        self.checkpoints.written(folder, run.checkpoint_folder(best_step) if best_step else None)

    def _finish(self) -> None:
        """Write adapter/: the best checkpoint's where a metric chooses, else the last step's."""
        run = self.run_directory
        self._settled = False
        chosen = self.state.best_step or self.state.step
        if chosen != self.state.step:
            keep_best(run.checkpoint_folder(chosen), self.model, self.training.best_metric, self.display.say)
        check_finite_adapter(self.model)
        if self.accelerator.is_main_process:
            write_adapters(run, self.model, self.data.tokenizer, self.record)
        self.accelerator.wait_for_everyone()
        if self.training.trackers:
            self.accelerator.end_training()
        took = duration(self.speed.seconds)
        self.display.say(f"trained {self.state.step} steps in {took}; the adapter is in {run.adapter_folder}")
