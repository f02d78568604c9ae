"""`lora-dpo rounds`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.cli.app import app
from lora_dpo.cli.scripts import names_in, until_stopped
from lora_dpo.cli.training import TAKES_KEYS


@app.command("rounds", context_settings=TAKES_KEYS)
def rounds_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a .py or a .yaml file.")],
    resume: Annotated[
        bool, typer.Option(help="Go on with the rounds in the recipe's run directory.")
    ] = False,
    accept: Annotated[
        str, typer.Option(metavar="KEY,…", help="With --resume: keys that are meant to differ.")
    ] = "",
) -> None:
    """Iterative DPO: sample, judge, pair, train, measure, and again, on one base in memory.

    RECIPE makes a lora_dpo.IterativeRecipe. Keys can follow it: lora-dpo rounds RECIPE rounds.count=5
    judge.of=reward:runs/reward sampling.responses=16. Each round has its run directory, RUN/round-N/run.

    Rounds that were stopped or killed go on with --resume: what is done is not done again. More rounds after
    the last one: --resume --accept rounds.count rounds.count=5.
    """
    from lora_dpo.recipe import load_recipe
    from lora_dpo.rounds import run_rounds

    until_stopped(run_rounds, load_recipe(recipe, context.args), resume, names_in(accept))
