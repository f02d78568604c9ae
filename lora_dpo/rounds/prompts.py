"""The prompts of a loop: split once, written down, and dealt out to the rounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from lora_dpo.errors import DataError
from lora_dpo.preferences import Prompt, describe_skipped, load_prompts
from lora_dpo.recipe import Data, IterativeRecipe
from lora_dpo.rounds.directory import LoopDirectory
from lora_dpo.run_directory import write_text
from lora_dpo.training import Display


def prepare_prompts(recipe: IterativeRecipe, loop: LoopDirectory, display: Display) -> None:
    """Write the loop's prompts, unless they are there: what it answers must not change while it runs."""
    # Without its recipe what lies there is what an earlier attempt left, of whatever recipe.
    if loop.recipe_file.exists() and loop.prompts_file.exists() and loop.held_out_file.exists():
        return
    loaded = load_prompts(recipe.data, seed=recipe.training.seed)
    for line in describe_skipped(loaded):
        display.say(line)
    for what, rows in (("", loaded.train), ("held-out ", loaded.eval)):
        if not rows:
            raise DataError(f"rounds: no {what}prompt is left: see data.train, data.eval, data.eval_fraction")
    Random(f"held out {recipe.training.seed}").shuffle(loaded.eval)
    _write(loop.held_out_file, loaded.eval[: recipe.rounds.held_out_prompts])
    _write(loop.prompts_file, loaded.train)


def _write(file: Path, prompts: Sequence[Prompt]) -> None:
    rows = []
    for item in prompts:
        row: dict = {"prompt": item.prompt}
        if item.tools:
            row["tools"] = item.tools
        if item.template_kwargs:
            row["chat_template_kwargs"] = dict(item.template_kwargs)
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(file, "".join(rows))


def read_prompts(recipe: IterativeRecipe, file: Path) -> list[Prompt]:
    return load_prompts(Data(str(file), format=recipe.data.format)).train


def prompts_of_round(recipe: IterativeRecipe, prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The prompts of the round with this number, from 1: a function of the seed.

    They are dealt out in random order, all of them once before any comes again.
    """
    count = min(recipe.rounds.prompts or len(prompts), len(prompts))
    dealt: list[int] = []
    for turn in range(number * count // len(prompts) + 1):
        order = list(range(len(prompts)))
        Random(f"prompts {recipe.training.seed} {turn}").shuffle(order)
        dealt += order
    # Where a new turn begins within a round, it may deal a prompt that the round has already.
    mine = dict.fromkeys(dealt[(number - 1) * count : number * count])
    return [prompts[n] for n in mine]
