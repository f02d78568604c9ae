"""`lora-dpo train` and `lora-dpo eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_dpo.cli.app import app
from lora_dpo.cli.scripts import names_in, train_recipe

if TYPE_CHECKING:
    from lora_dpo.finished import Sample
    from lora_dpo.training import Display

TAKES_KEYS = {"allow_extra_args": True}
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]


@app.command("train", context_settings=TAKES_KEYS)
def train_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a .py or a .yaml file.")],
    resume: Annotated[bool, typer.Option(help="Go on with the run in the recipe's run directory.")] = False,
    accept: Annotated[
        str, typer.Option(metavar="WHAT,…", help="With --resume: what is meant to differ; see below.")
    ] = "",
) -> None:
    """Train a recipe.

    Keys of the recipe can follow it: lora-dpo train RECIPE loss.beta=0.05 training.epochs=2. An unknown
    key names the nearest known one; `python RECIPE.py --help` lists them all.

    A run that was stopped or killed goes on with --resume. Where the recipe, the data, the base or the
    reference are not those that it began with it is refused, unless --accept names what is meant: data, base,
    reference, or keys of the recipe such as training.epochs.
    """
    from lora_dpo.recipe import load_recipe

    train_recipe(load_recipe(recipe, context.args), resume, names_in(accept))


@app.command("eval")
def eval_command(
    run: RunFolder,
    data: Annotated[str | None, typer.Option(help="Held-out rows instead of the recipe's own.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many prompts to answer, base and policy.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Evaluate a run on held-out pairs.

    Accuracy and margin with 95% bootstrap intervals, log-prob changes, how far the policy has moved from its
    data (shift/…), and answers of base and policy side by side.
    """
    from lora_dpo.finished import evaluate_run, open_finished, shift_of_run, side_by_side
    from lora_dpo.training import Display

    display = Display()
    finished = open_finished(run, data=data, display=display)
    result = evaluate_run(finished, display=display)
    display.say(f"\n{result.examples} held-out examples, mean with 95% bootstrap interval")
    for name, interval in result.metrics.items():
        display.say(f"  {name:<24} {interval}")
    display.say(f"written to {finished.directory.evaluation_file}")
    shift = shift_of_run(finished, display=display)
    if shift:
        display.say("\nthe policy's own samples beside the data; gaps and changes in nats a token")
    for name, value in shift.items():
        display.say(f"  {name:<24} {value:.3f}")
    if samples and not finished.recipe.loss.needs.rewards:
        made = side_by_side(finished, count=samples, max_new_tokens=max_new_tokens, display=display)
        _show_samples(display, made)
        display.say(f"{len(made)} answers side by side: {finished.directory.samples_file}")


def _show_samples(display: Display, samples: Sequence[Sample]) -> None:
    for sample in samples[:4]:
        display.say(f"\nprompt  {_short(sample.prompt)}")
        display.say(f"base    {_short(sample.base)}")
        if sample.reference is not None:
            display.say(f"ref     {_short(sample.reference)}")
        display.say(f"policy  {_short(sample.policy)}")
    if samples:
        base, policy = (sum(len(t.split()) for t in texts) / len(samples) for texts in _answers(samples))
        display.say(f"\nwords an answer: base {base:.1f}, policy {policy:.1f}")


def _answers(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [sample.base for sample in samples], [sample.policy for sample in samples]


def _short(text: str, width: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
