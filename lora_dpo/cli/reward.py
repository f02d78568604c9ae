"""`lora-dpo reward`: train reward models, and apply judges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.cli.app import app
from lora_dpo.cli.scripts import names_in, until_stopped
from lora_dpo.cli.training import TAKES_KEYS

reward_app = typer.Typer(help="Reward models and other judges.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(reward_app, name="reward")


@reward_app.command("train", context_settings=TAKES_KEYS)
def reward_train_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a .py or a .yaml file.")],
    resume: Annotated[bool, typer.Option(help="Go on with the run in the recipe's run directory.")] = False,
    accept: Annotated[
        str, typer.Option(metavar="WHAT,…", help="With --resume: what is meant to differ; see train --help.")
    ] = "",
) -> None:
    """Train a reward model on preference pairs: an adapter and a scalar head on the recipe's base.

    Keys of the recipe can follow it: lora-dpo reward train RECIPE loss.centering=0.01 training.epochs=2. A
    recipe whose loss is no reward model's gets BradleyTerry. Afterwards its accuracy on the held-out pairs is
    said, with a 95% interval. adapter/ loads in transformers' sequence classification with PEFT.
    """
    from lora_dpo.recipe import load_recipe, override
    from lora_dpo.reward import as_reward_recipe, train_reward

    chosen = override(as_reward_recipe(load_recipe(recipe), print), context.args)
    directory = until_stopped(train_reward, chosen, resume, names_in(accept))
    if os.environ.get("RANK", "0") == "0":
        _conclude(directory.path)


def _conclude(run: Path) -> None:
    """Held-out accuracy, and what to do next."""
    from lora_dpo.finished import evaluate_run, open_finished
    from lora_dpo.training import Display

    display = Display()
    finished = open_finished(run, display=Display(quiet=True), need_data=False)
    if finished.data.eval:
        result = evaluate_run(finished, display=display)
        said = f"{result.metrics['rewards/accuracy']} on {result.examples} held-out pairs"
        display.say(f"accuracy: {said} (mean with 95% bootstrap interval)")
    else:
        display.say("accuracy: not measured without held-out pairs (data.eval_fraction=0.1 holds out some)")
    display.say(f"reward:   lora-dpo reward score FILE --judge reward:{run}")
    display.say(f"export:   lora-dpo export {run} --to adapter")
