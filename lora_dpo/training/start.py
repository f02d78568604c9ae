"""From a recipe to a run: data, base and adapter, preflight, then the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.evaluation import metric_names
from lora_dpo.model import (
    Model,
    bare,
    find_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_record,
    record_notes,
    record_of,
)
from lora_dpo.recipe import Recipe, field_names, pinned, to_yaml
from lora_dpo.reference import ReferenceCache, base_fingerprint
from lora_dpo.run_directory import RunDirectory, need_space, write_text
from lora_dpo.stopping import Interrupted, Stopped, Stops
from lora_dpo.training.checkpoint import RECIPE
from lora_dpo.training.data import TrainingData, prepare_data
from lora_dpo.training.eva import start_from_data
from lora_dpo.training.keeping import Checkpoints
from lora_dpo.training.observers import Observer, check_trackers
from lora_dpo.training.progress import Display
from lora_dpo.training.resuming import recipe_differences, refuse
from lora_dpo.training.trainer import Trainer


def train(
    recipe: Recipe,
    *,
    observers: Sequence[Observer] = (),
    resume: bool = False,
    accept: Sequence[str] = (),
    quiet: bool = False,
    on: Model | None = None,
) -> RunDirectory:
    """Run a recipe: data, base and adapter, preflight, training. Returns the run directory.

    observers are called with every `Record`. resume goes on with the run in the recipe's run directory, from
    its newest whole checkpoint. accept: what may then differ from the run that began: keys or sections of the
    recipe, "data", "base", "reference"; anything else that differs is refused. on: the recipe's base, alone,
    as it lies in memory already: it is used instead of another copy, and is alone again when this ends.
    Raises UserError for what the user can mend, and Stopped after SIGINT, SIGTERM or SIGHUP.
    """
    display = Display(quiet=quiet)
    stops = Stops(say=display.say)
    with stops.listening():
        try:
            return _prepared(recipe, display, stops, observers, resume, accept, on)
        except Interrupted as stop:
            run = RunDirectory(Path(recipe.run_directory).expanduser())
            newest = Checkpoints(run, recipe.training.keep_checkpoints).newest_written()
            raise Stopped(stop.number, newest, begun=run.recipe_file.exists()) from None
        finally:
            if on is not None:
                bare(on)


def _prepared(
    recipe: Recipe,
    display: Display,
    stops: Stops,
    observers: Sequence[Observer],
    resume: bool,
    accept: Sequence[str],
    on: Model | None,
) -> RunDirectory:
    """Everything that needs no data, under the lock of the run directory."""
    check_training(recipe)
    check_accept(accept, resume)
    recipe = pinned(recipe)
    run = RunDirectory.create(recipe.run_directory, resume=resume)
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=1,
        cpu=recipe.base.device == "cpu",
        log_with=list(recipe.training.trackers) or None,
        project_dir=str(run.path),
    )
    display.quiet = display.quiet or not accelerator.is_main_process
    check_processes(recipe, accelerator)
    with run.locked() if accelerator.is_main_process else nullcontext():
        if not resume and run.recipe_file.exists() and accelerator.is_main_process:
            raise RunError(f"another process began a run in {run.path}: name another run_directory")
        if accelerator.is_main_process:
            run.sweep()
            need_space(run.path, 0, "a run")
        checkpoints = Checkpoints(run, recipe.training.keep_checkpoints)
        newest = None
        if resume and accelerator.is_main_process:
            newest = checkpoints.newest(display.say)
        # All processes go on from the one that the main process found.
        newest = broadcast_object_list([newest])[0]
        if resume:
            # What can be refused at once is, before the minutes that data and base may take.
            recorded = newest / RECIPE if newest is not None else run.recipe_file
            refuse(recipe_differences(recipe, recorded), accept)
        _train(recipe, run, accelerator, display, stops, checkpoints, observers, resume, newest, accept, on)
    return run


def _train(
    recipe: Recipe,
    run: RunDirectory,
    accelerator: Accelerator,
    display: Display,
    stops: Stops,
    checkpoints: Checkpoints,
    observers: Sequence[Observer],
    resume: bool,
    newest: Path | None,
    accept: Sequence[str],
    on: Model | None,
) -> None:
    # Everything about the data is known before the minutes that loading a large base takes.
    data = prepare_data(
        recipe.data, recipe.loss, load_tokenizer(recipe.base), seed=recipe.training.seed, display=display
    )
    if (recipe.training.eval_every or recipe.training.best_metric) and not data.eval:
        raise RecipeError("training.eval_every needs held-out rows: data.eval, eval_fraction or eval_last")
    check_positions(recipe, data)
    model = _load(recipe, data, accelerator, display, on)
    # Now, as the base's files may be others by the time that the adapter is written.
    template, dtype = data.tokenizer.chat_template, model.compute_dtype
    main = accelerator.is_main_process
    record = record_of(recipe.base, model.causal, dtype, template, say=display.say) if main else None
    base = base_fingerprint(model)
    with reference_cache(recipe, model, display, base=base) as cache:
        trainer = Trainer(
            recipe,
            run,
            model,
            data,
            accelerator,
            display,
            observers,
            cache,
            stops=stops,
            checkpoints=checkpoints,
            base=base,
            record=record,
        )
        if resume:
            trainer.resume(newest, accept)
        trainer.check_space()
        trainer.preflight()
        # A process that is late must not take this run's own recipe.yaml for an earlier run's.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if not resume:
                run.metrics_file.unlink(missing_ok=True)  # of a run whose recipe and checkpoints were deleted
            # From here on it is a run: what failed before this line can simply be started again.
            write_text(run.recipe_file, to_yaml(recipe))
        trainer.run()


def _load(
    recipe: Recipe, data: TrainingData, accelerator: Accelerator, display: Display, on: Model | None
) -> Model:
    started = time.monotonic()
    reference = recipe.reference if recipe.loss.needs_reference else None
    model = load_model(
        recipe.base,
        recipe.adapter,
        seed=recipe.training.seed,
        reference=reference,
        rewards=recipe.loss.needs.rewards,
        on=on,
    )
    if recipe.adapter.init == "eva":
        budget, seed = recipe.training.tokens_per_microbatch, recipe.training.seed
        count = start_from_data(model, data.train, tokens_per_microbatch=budget, seed=seed)
        display.say(f"the adapter's A starts from the data's directions, settled over {count} micro-batches")
    if accelerator.num_processes > 1:
        display.say(f"each step's pairs are spread over {accelerator.num_processes} processes")
    display.say(
        f"base: {recipe.base.model}, {describe_model(model, recipe)}, {time.monotonic() - started:.1f}s"
    )
    told = [describe_kept(model), describe_reference(recipe)]
    for line in [*told, *describe_differences(recipe, data.tokenizer.chat_template)]:
        if line:
            display.say(line)
    return model


def reference_cache(
    recipe: Recipe, model: Model, display: Display, *, base: str | None = None
) -> AbstractContextManager[ReferenceCache | None]:
    """The open cache of this model's reference; None where the recipe wants none, or no loss term needs a
    reference.

    None too where the reference is synchronised: each of them speaks for some steps only, so that hardly a
    pair is met twice by the same, and a cache that is not there can't be stale. And none where the objective
    needs whole distributions, which are not kept. base: the base's fingerprint, where it is known.
    """
    wanted = recipe.training.reference_cache and not recipe.reference.sync_every
    needs = recipe.loss.needs
    if not (wanted and needs.reference) or needs.divergence:
        return nullcontext()
    return ReferenceCache.open(model, base=base, say=display.say)


def check_training(recipe: Recipe) -> None:
    """What the types can't say: trackers that are there, and a metric that will be."""
    training = recipe.training
    check_trackers(training.trackers)
    if training.best_metric is None:
        return
    names = metric_names(recipe.loss)
    if training.best_metric not in names:
        takes = f"it takes one of {', '.join(sorted(names))}"
        raise RecipeError(f"training.best_metric got {training.best_metric!r}; {takes}")


def check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    """Adapters are small: processes each hold the base and add up gradients, nothing is sharded."""
    if accelerator.num_processes > recipe.training.pairs_per_step:
        raise RecipeError(
            f"training.pairs_per_step got {recipe.training.pairs_per_step}; it takes at least one pair for"
            f" each of the {accelerator.num_processes} processes"
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP"):
        raise RunError(f"accelerate is configured for {kind}; configure plain multi-GPU, or none")


def check_positions(recipe: Recipe, data: TrainingData) -> None:
    """Raise RecipeError where an example is longer than the model has positions for."""
    text = load_config(recipe.base).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    item = max([*data.train, *data.eval], key=lambda item: max(map(len, item.rests)) + len(item.prefix))
    longest = len(item.prefix) + max(map(len, item.rests))
    if positions and longest > positions:
        raise RecipeError(
            f"data.max_tokens got {recipe.data.max_tokens}, and {item.where} has a side of {longest} tokens;"
            f" this model takes at most {positions}"
        )


def check_accept(accept: Sequence[str], resume: bool) -> None:
    """Raise RecipeError for a name that nothing could have."""
    if accept and not resume:
        raise RecipeError("--accept says what a resumed run may change: give --resume with it")
    sections = field_names(Recipe)
    for name in accept:
        if name.partition(".")[0] not in sections:
            takes = f"data, base, reference, or keys of the recipe ({', '.join(sections)}, each with a .key)"
            raise RecipeError(f"--accept got {name!r}; it takes {takes}")


def describe_kept(model: Model) -> str:
    """What of a quantized base is not quantized, with its size; nothing for one that isn't quantized."""
    parts = [f"{kind} {size / 2**20:,.1f} MiB" for kind, size in model.unquantized.items()]
    return f"kept unquantized: {', '.join(parts)}" if parts else ""


def describe_reference(recipe: Recipe) -> str:
    """Who the reference is, where that isn't simply the base of a fresh adapter."""
    start, reference = recipe.adapter.start_from, recipe.reference
    begun = f"training goes on from the adapter in {start}" if start else ""
    if not recipe.loss.needs_reference:
        return begun
    kind = reference.of(start)
    who = {
        "base": "the base",
        "start": "that adapter, frozen",
        "adapter": f"the adapter in {reference.adapter}",
    }[kind]
    if kind == "base" and start:
        return (
            f"note: {begun}, and the reference is the bare base (reference.kind=base): what that adapter has"
            " learned counts as a departure from it"
        )
    if reference.sync_every:
        who = (
            f"{who}, and after every {reference.sync_every} steps the policy as it is then; not kept on disk"
        )
    elif kind == "base":
        return ""
    return f"{begun}; reference: {who}" if begun else f"reference: {who}"


def describe_differences(recipe: Recipe, template: str | None) -> list[str]:
    """What is otherwise here than when the adapters that the recipe names were trained.

    template: the chat template's text.
    """
    named = {"adapter.start_from": recipe.adapter.start_from}
    if recipe.loss.needs_reference:
        named["reference.adapter"] = recipe.reference.adapter
    lines = []
    for key, folder in named.items():
        if folder is not None:
            place = find_adapter(folder, key)
            lines += record_notes(read_record(place), recipe.base, template, f"the adapter in {place}")
    return lines


def describe_model(model: Model, recipe: Recipe) -> str:
    total = sum(p.numel() * p.element_size() for p in model.network.parameters()) / 2**20
    trainable = sum(p.numel() for p in model.trainable.values())
    dtype = str(model.compute_dtype).removeprefix("torch.")
    return (
        f"{recipe.base.quantization} with {dtype} compute on {model.device.type}, {total:,.0f} MiB,"
        f" {trainable:,} adapter parameters"
    )
