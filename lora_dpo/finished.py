"""A run that trained: its recipe, base, adapter and data again, and how good it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.errors import DataError, RunError
from lora_dpo.evaluation import Evaluation, evaluate
from lora_dpo.model import (
    Model,
    check_early,
    load_adapter,
    load_model,
    load_tokenizer,
    read_record,
    record_notes,
)
from lora_dpo.preferences import AnyRecord, Preference, Rating
from lora_dpo.recipe import Recipe, load_recipe, override
from lora_dpo.run_directory import MANIFEST, RunDirectory, damage, holds_adapter, write_text
from lora_dpo.sampling import Role, greedy
from lora_dpo.training import (
    Display,
    HeldOut,
    ShiftMeter,
    TrainingData,
    chat_tokenizer,
    prepare_held_out,
    reference_cache,
)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run directory whose adapter is on its base again, frozen. source: of the rows, where they are not
    those that the run held out.
    """

    directory: RunDirectory
    recipe: Recipe
    model: Model
    data: HeldOut
    source: str | None = None

    @property
    def tokens_per_microbatch(self) -> int:
        return self.recipe.training.tokens_per_microbatch


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what base and policy answer to it, greedily; so does a reference that is an
    adapter.

    chosen: the answer that the data prefer; empty where they have only thumbs down.
    """

    prompt: str
    base: str
    policy: str
    chosen: str
    reference: str | None = None


def open_finished(
    path: str | Path,
    *,
    data: str | None = None,
    need_data: bool = True,
    display: Display | None = None,
    overrides: Sequence[str] = (),
    on: Model | None = None,
) -> FinishedRun:
    """Load a run's base, adapter and held-out rows.

    data: a source to hold out instead of the recipe's own. need_data: whether rows that can't be read (they
    moved, or were given from Python) are an error. on: the run's base, alone, as it lies in memory already.
    Raises RunError where there is no run, or no adapter yet.
    """
    display = display or Display(quiet=True)
    directory = RunDirectory.open(path)
    check_adapter(directory)
    recipe = override(load_recipe(directory.recipe_file), overrides)
    tokenizer = load_tokenizer(recipe.base)
    try:
        held_out = prepare_held_out(
            recipe.data, recipe.loss, tokenizer, seed=recipe.training.seed, display=display, source=data
        )
    except DataError as error:
        if need_data:
            raise DataError(f"{error} (--data FILE evaluates on other rows)") from error
        held_out = HeldOut([], [], chat_tokenizer(tokenizer, recipe.data))
    adapters = str(directory.adapter_folder), reference_of(directory, recipe)
    check_early(recipe.base, adapters[0], "the adapter")
    kind = "reward" if recipe.loss.needs.rewards else "policy"
    model = load_adapter(load_model(recipe.base, on=on), adapters[0], reference=adapters[1], kind=kind)
    record, template = read_record(directory.adapter_folder), held_out.tokenizer.chat_template
    for line in record_notes(record, recipe.base, template, f"the adapter in {adapters[0]}"):
        display.say(line)
    return FinishedRun(directory, recipe, model, held_out, data)


def check_adapter(run: RunDirectory) -> None:
    """Raise RunError where a run has no adapter yet, or not the one that it wrote."""
    if not run.has_adapter:
        raise RunError(
            f"{run.path} holds no trained adapter yet: its run has not ended (train --resume goes on)"
        )
    check_whole(run.adapter_folder)


def check_whole(folder: Path) -> None:
    """Raise RunError where a folder that a run wrote is not as it was written; it may hold more."""
    wrong = damage(folder, more=True) if (folder / MANIFEST).is_file() else None
    if wrong is not None:
        raise RunError(
            f"{folder} is not as the run wrote it: {wrong} (train --resume writes it again from the last"
            " checkpoint)"
        )


def reference_of(directory: RunDirectory, recipe: Recipe) -> str | None:
    """The folder of the adapter that was the run's reference; None where the base was, or nothing needs one.

    Raises RunError where it is gone.
    """
    kind = recipe.reference.of(recipe.adapter.start_from)
    if not recipe.loss.needs_reference or (kind == "base" and not recipe.reference.sync_every):
        return None
    folder = directory.reference_folder
    if not holds_adapter(folder):
        raise RunError(f"{folder} is missing: it held the adapter that was this run's reference")
    check_whole(folder)
    return str(folder)


def evaluate_run(run: FinishedRun, *, display: Display | None = None) -> Evaluation:
    """Held-out metrics with intervals; also written to evaluation.json, with the source of the rows where
    they are not the run's own. Raises RunError without held-out rows.
    """
    if not run.data.eval:
        raise RunError("this run holds out no rows: give some with --data FILE")
    display = display or Display(quiet=True)
    with (
        reference_cache(run.recipe, run.model, display) as cache,
        display.counting("evaluating", len(run.data.eval)) as advance,
    ):
        result = evaluate(
            run.model,
            run.recipe.loss,
            run.data.eval,
            tokens_per_microbatch=run.tokens_per_microbatch,
            progress=advance,
            cache=cache,
        )
    told = dataclasses.asdict(result) | {"source": run.source}
    write_text(run.directory.evaluation_file, json.dumps(told, indent=1))
    return result


def shift_of_run(run: FinishedRun, *, display: Display | None = None) -> dict[str, float]:
    """`shift/…` of the trained policy on held-out prompts, as the run's last ones were; nothing where the
    recipe leaves it out, or no row is held out.
    """
    display = display or Display(quiet=True)
    if not run.data.eval:
        return {}
    data = TrainingData([], run.data.eval, run.data.tokenizer)
    return ShiftMeter(run.recipe, run.model, data, display.say).measure(
        run.tokens_per_microbatch, display.say
    )


def side_by_side(
    run: FinishedRun, *, count: int = 16, max_new_tokens: int = 128, display: Display | None = None
) -> list[Sample]:
    """Greedy responses of base and policy, and of a reference that is an adapter, to held-out prompts; also
    written to samples.jsonl.
    """
    display = display or Display(quiet=True)
    chat = run.data.tokenizer
    records = [r for r in _distinct_prompts(run.data.records) if r.prompt][:count]
    if not records:
        display.say("no held-out row has a prompt to answer")
        return []
    limit = run.recipe.data.max_prompt_tokens or run.recipe.data.max_tokens
    # Cut to the end, as long as training's prompts were at most.
    prompts = [chat.prompt_ids(r.prompt, r.tools, r.template_kwargs).tolist()[-limit:] for r in records]
    texts: dict[str, list[str]] = {}
    roles: list[Role] = ["base", "policy", *(["reference"] if run.model.reference_adapters else [])]  # pyright: ignore[reportAssignmentType]
    with display.counting("generating", len(roles) * len(prompts)) as advance:
        for role in roles:
            made = greedy(
                run.model,
                prompts,
                stop_ids=chat.end_of_turn_ids,
                max_new_tokens=max_new_tokens,
                role=role,
                progress=advance,
            )
            texts[role] = [chat.decode(ids) for ids in made]
    references = texts.get("reference") or [None] * len(records)
    samples = [
        Sample(shown(record.prompt), base, policy, shown(_preferred(record)), reference)
        for record, base, policy, reference in zip(
            records, texts["base"], texts["policy"], references, strict=True
        )
    ]
    lines = (json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_text(run.directory.samples_file, "".join(lines))
    return samples


def _preferred(record: AnyRecord) -> Any:
    if isinstance(record, Preference):
        return record.chosen
    return "" if isinstance(record, Rating) and not record.desirable else record.response


def _distinct_prompts(records: Sequence[AnyRecord]) -> list[AnyRecord]:
    """One record a prompt: the last one that names a preferred answer, if any does."""
    found: dict[str, AnyRecord] = {}
    for record in records:
        prompt = json.dumps(record.prompt, sort_keys=True, default=str)
        if prompt not in found or _preferred(record):
            found[prompt] = record
    return list(found.values())


def shown(turns: Any) -> str:
    """Messages as a person reads them: the only turn's content, or every turn with its role."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)
