"""Iterative DPO: sample, judge, pair, train, measure, and again, on one base that is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.model import load_model
from lora_dpo.recipe import IterativeRecipe, Recipe, field_names, pinned, to_yaml
from lora_dpo.reference import base_fingerprint
from lora_dpo.rounds.directory import LoopDirectory
from lora_dpo.rounds.judges import check_judges
from lora_dpo.rounds.policies import Loop
from lora_dpo.rounds.prompts import prepare_prompts, read_prompts
from lora_dpo.rounds.stages import NoPairs, do_round, measure_stage
from lora_dpo.rounds.telling import Verdict, measured, say_changes, table, verdict, write_rounds
from lora_dpo.run_directory import RunDirectory, write_text
from lora_dpo.stopping import Interrupted, Stopped, Stops
from lora_dpo.training import Display, chat_tokenizer
from lora_dpo.training.resuming import Difference, recipe_differences, refuse


class RoundsStopped(Stopped):
    """The loop was asked to stop, and has: what was done stays, and it goes on from there."""

    def __init__(self, number: int):
        Exception.__init__(self, "stopped; the same command with --resume goes on where it was")
        self.code = 128 + number


def run_rounds(
    recipe: Recipe,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    quiet: bool = False,
) -> LoopDirectory:
    """Run a loop's recipe, or what is left of it. Returns its folder.

    resume goes on with the loop in the recipe's run directory: nothing that is done is done again, and on a
    CPU the result is that of a loop that nobody stopped. accept: keys or sections of the recipe that may then
    differ from what it began with, such as rounds.count; anything else that differs is refused.
    Raises UserError for what the user can mend, and Stopped after SIGINT, SIGTERM or SIGHUP.
    """
    if not isinstance(recipe, IterativeRecipe):
        raise RecipeError("rounds take a lora_dpo.IterativeRecipe, which says how to sample and who judges")
    display = Display(quiet=quiet)
    stops = Stops(say=display.say)
    with stops.listening():
        try:
            return _begun(recipe, display, resume, accept)
        except (Interrupted, Stopped) as stop:
            number = stop.number if isinstance(stop, Interrupted) else stop.code - 128
            raise RoundsStopped(number) from None


def _begun(recipe: IterativeRecipe, display: Display, resume: bool, accept: Sequence[str]) -> LoopDirectory:
    pin = pinned(recipe)
    assert isinstance(pin, IterativeRecipe)
    _check_accept(accept, resume)
    directory = LoopDirectory(Path(pin.run_directory).expanduser().absolute())
    directory.begin(resume=resume)
    with RunDirectory(directory.path).locked():
        if resume:
            differ = recipe_differences(pin, directory.recipe_file)
            _check_fixed(differ)
            for item in refuse(differ, accept):
                display.say(f"accepted: {item}")
        else:
            check_judges(pin)  # before there are rounds to resume
        prepare_prompts(pin, directory, display)
        write_text(directory.recipe_file, to_yaml(pin))
        _loop(pin, directory, display, accept)
    return directory


FIXED = (
    "data",
    "training.seed",
    "rounds.prompts",
    "rounds.held_out_prompts",
    "rounds.held_out_responses",
    "rounds.held_out_judge",
)
"""Keys by which a loop's prompts are dealt and its policies measured: another one half-way would change
nothing, or make its rounds' figures those of different things.
"""


def _check_fixed(differ: Sequence[Difference]) -> None:
    """Raise RunError for a difference that nobody can accept."""
    for item in differ:
        if item.accepted(FIXED):
            raise RunError(
                f"{item}; that cannot change in rounds that have begun. Put it back, or begin others with"
                " run_directory=…"
            )


def _check_accept(accept: Sequence[str], resume: bool) -> None:
    if accept and not resume:
        raise RecipeError("--accept says what a resumed loop may change: give --resume with it")
    sections = field_names(IterativeRecipe)
    for name in accept:
        if name.partition(".")[0] not in sections:
            takes = f"keys of the recipe ({', '.join(sections)}, each with a .key)"
            raise RecipeError(f"--accept got {name!r}; it takes {takes}")


def _loop(recipe: IterativeRecipe, directory: LoopDirectory, display: Display, accept: Sequence[str]) -> None:
    count, before = recipe.rounds.count, verdict(recipe, directory)
    if len(measured(directory)) > count or before.stop:
        display.say(f"these rounds are done already in {directory.path}")
        _finish(directory, display, before)
        return
    check_judges(recipe)
    held_out = read_prompts(recipe, directory.held_out_file)
    prompts = read_prompts(recipe, directory.prompts_file)
    base = load_model(recipe.base)
    chat = chat_tokenizer(base.tokenizer, recipe.data)
    of_runs = [name for name in accept if name.partition(".")[0] in field_names(Recipe)]
    loop = Loop(recipe, directory, base, base_fingerprint(base), chat, prompts, held_out, display, of_runs)
    display.say(f"{len(prompts):,} prompts to draw from, {len(held_out):,} held out")
    measure_stage(loop, 0)
    for number in range(1, count + 1):
        if directory.round(number).measures() is None:
            display.say(f"\nround {number} of {count}")
            try:
                do_round(loop, number)
            except NoPairs as end:
                display.say(str(end))
                break
            say_changes(directory, number, display)
        found = verdict(recipe, directory)
        write_rounds(directory, found)
        if found.stop:
            break
    _finish(directory, display, verdict(recipe, directory))


def _finish(directory: LoopDirectory, display: Display, found: Verdict) -> None:
    write_rounds(directory, found)
    display.say("\n" + table(directory, found))
    if found.stop:
        display.say(found.stop)
    if found.best:
        run = directory.round(found.best).run.path
        display.say(f"the best policy is that of round {found.best}: {run}")
    else:
        display.say("no round's policy is better than where the loop began")
