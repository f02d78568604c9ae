"""From a recipe to a run: data, base and adapter, preflight, then the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.evaluation import metric_names
from lora_dpo.model import Model, load_config, load_model, load_tokenizer
from lora_dpo.recipe import Recipe, load_recipe, pinned, to_dict, to_yaml
from lora_dpo.reference import ReferenceCache
from lora_dpo.run_directory import RunDirectory, write_text
from lora_dpo.training.data import TrainingData, prepare_data
from lora_dpo.training.eva import start_from_data
from lora_dpo.training.observers import Observer, check_trackers, flat
from lora_dpo.training.progress import Display
from lora_dpo.training.trainer import Trainer


def train(
    recipe: Recipe, *, observers: Sequence[Observer] = (), resume: bool = False, quiet: bool = False
) -> RunDirectory:
    """Run a recipe: data, base and adapter, preflight, training. Returns the run directory.

    observers are called with every `Record`. resume goes on with the run in the recipe's run directory.
    Raises UserError for what the user can mend, and Stopped after SIGINT or SIGTERM.
    """
    check_training(recipe)
    recipe = pinned(recipe)
    run = RunDirectory.create(recipe.run_directory, resume=resume)
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=1,
        cpu=recipe.base.device == "cpu",
        log_with=list(recipe.training.trackers) or None,
        project_dir=str(run.path),
    )
    check_processes(recipe, accelerator)
    with run.locked() if accelerator.is_main_process else nullcontext():
        if resume:
            check_same_recipe(recipe, run)
        elif run.recipe_file.exists() and accelerator.is_main_process:
            raise RunError(f"another process began a run in {run.path}: name another run_directory")
        if accelerator.is_main_process:
            run.sweep()
        _train(recipe, run, accelerator, observers, resume, quiet)
    return run


def _train(
    recipe: Recipe,
    run: RunDirectory,
    accelerator: Accelerator,
    observers: Sequence[Observer],
    resume: bool,
    quiet: bool,
) -> None:
    display = Display(quiet=quiet or not accelerator.is_main_process)
    # Everything about the data is known before the minutes that loading a large base takes.
    data = prepare_data(
        recipe.data, recipe.loss, load_tokenizer(recipe.base), seed=recipe.training.seed, display=display
    )
    if (recipe.training.eval_every or recipe.training.best_metric) and not data.eval:
        raise RecipeError("training.eval_every needs held-out rows: data.eval, eval_fraction or eval_last")
    check_positions(recipe, data)
    started = time.monotonic()
    reference = recipe.reference if recipe.loss.needs_reference else None
    model = load_model(recipe.base, recipe.adapter, seed=recipe.training.seed, reference=reference)
    if recipe.adapter.init == "eva":
        budget, seed = recipe.training.tokens_per_microbatch, recipe.training.seed
        count = start_from_data(model, data.train, tokens_per_microbatch=budget, seed=seed)
        display.say(f"the adapter's A starts from the data's directions, settled over {count} micro-batches")
    if accelerator.num_processes > 1:
        display.say(f"each step's pairs are spread over {accelerator.num_processes} processes")
    display.say(
        f"base: {recipe.base.model}, {describe_model(model, recipe)}, {time.monotonic() - started:.1f}s"
    )
    for line in describe_kept(model), describe_reference(recipe):
        if line:
            display.say(line)
    with reference_cache(recipe, model, display) as cache:
        trainer = Trainer(recipe, run, model, data, accelerator, display, observers, cache)
        if resume:
            trainer.resume()
        trainer.preflight()
        # A process that is late must not take this run's own recipe.yaml for an earlier run's.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not resume:
            # From here on it is a run: what failed before this line can simply be started again.
            write_text(run.recipe_file, to_yaml(recipe))
        trainer.run()


def reference_cache(
    recipe: Recipe, model: Model, display: Display
) -> AbstractContextManager[ReferenceCache | None]:
    """The open cache of this model's reference; None where the recipe wants none, or no loss term needs a
    reference.

    None too where the reference is synchronised: each of them speaks for some steps only, so that hardly a
    pair is met twice by the same, and a cache that is not there can't be stale. And none where the objective
    needs whole distributions, which are not kept.
    """
    wanted = recipe.training.reference_cache and not recipe.reference.sync_every
    needs = recipe.loss.needs
    if not (wanted and needs.reference) or needs.divergence:
        return nullcontext()
    return ReferenceCache.open(model, say=display.say)


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


MAY_CHANGE = {
    "run_directory",
    "data.workers",
    "training.tokens_per_microbatch",
    "training.gradient_checkpointing",
    "training.save_every",
    "training.keep_checkpoints",
    "training.trackers",
    "training.reference_cache",
}
"""Keys that a resumed run may change: they don't touch what is learned."""


def check_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Raise RunError, naming the keys, where the recipe isn't the one that the run began with."""
    now, then = flat(to_dict(recipe)), flat(to_dict(load_recipe(run.recipe_file)))
    differ = [k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in MAY_CHANGE]
    if differ:
        changes = ", ".join(f"{k}: {then.get(k)} → {now.get(k)}" for k in sorted(differ))
        raise RunError(f"--resume: the recipe is not the one that {run.path} began with ({changes})")


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


def describe_model(model: Model, recipe: Recipe) -> str:
    total = sum(p.numel() * p.element_size() for p in model.network.parameters()) / 2**20
    trainable = sum(p.numel() for p in model.trainable.values())
    dtype = str(model.compute_dtype).removeprefix("torch.")
    return (
        f"{recipe.base.quantization} with {dtype} compute on {model.device.type}, {total:,.0f} MiB,"
        f" {trainable:,} adapter parameters"
    )
