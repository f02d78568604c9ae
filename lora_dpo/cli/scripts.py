"""What a recipe script ends with, and what it shares with `lora-dpo train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.cli.ending import friendly_errors, last_words

if TYPE_CHECKING:
    from lora_dpo.recipe import Recipe


def run(
    recipe: Recipe, arguments: Sequence[str] | None = None, *, job: Callable[..., object] | None = None
) -> None:
    """What a recipe script ends with: `python recipes/NAME.py key=value … [--resume [--accept WHAT,…]]`.

    job(recipe, resume=…, accept=…) is what is done; training, unless something else is given. Prints errors
    without a traceback and exits with the status the command line would.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with friendly_errors():
        from lora_dpo.recipe import override

        if "-h" in words or "--help" in words:
            last_words(recipe_help(recipe), sys.stdout)  # the pipe may be closed before all is read
            return
        accept = _taken(words, "--accept")
        resume = "--resume" in words
        recipe = override(recipe, [word for word in words if word != "--resume"])
        if job is None:
            train_recipe(recipe, resume, accept)
        else:
            until_stopped(job, recipe, resume, accept)


def _taken(words: list[str], option: str) -> list[str]:
    """Takes `--option a,b` or `--option=a,b` out of the words; returns its names."""
    from lora_dpo.errors import RecipeError

    names: list[str] = []
    for place, word in reversed(list(enumerate(words))):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if not equals and (place + 1 == len(words) or words[place + 1].startswith("--")):
            raise RecipeError(f"{option} takes what is meant to differ, such as data or loss.beta")
        value = value if equals else words.pop(place + 1)
        del words[place]
        names += names_in(value)
    return names


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def recipe_help(recipe: Recipe) -> str:
    """Every key of a recipe with its value and what it takes."""
    from lora_dpo.recipe import keys_of

    script = Path(sys.argv[0]).name
    lines = [
        f"usage: python {script} [key=value ...] [--resume [--accept WHAT,...]]",
        "",
        "--resume goes on with a run that was stopped or killed. --accept names what is meant to differ from",
        "the run that began: data, base, reference, or keys such as training.epochs.",
        "",
        "keys, their values here, what they take:",
    ]
    lines += [f"  {key}={value}    ({takes})" for key, takes, value in keys_of(recipe)]
    return "\n".join(lines)


def train_recipe(recipe: Recipe, resume: bool, accept: Sequence[str]) -> None:
    from lora_dpo.training import train

    directory = until_stopped(train, recipe, resume, accept)
    if os.environ.get("RANK", "0") == "0":
        last_words(f"evaluate: lora-dpo eval {directory.path}", sys.stdout)
        kind = (
            "adapter" if recipe.loss.needs.rewards else "merged"
        )  # a reward model's head has no place in one
        last_words(f"export:   lora-dpo export {directory.path} --to {kind}", sys.stdout)


def until_stopped(job: Callable[..., Any], recipe: Recipe, resume: bool, accept: Sequence[str]) -> Any:
    """The job's result; a run that was asked to stop says how to go on and exits with the signal's status."""
    from lora_dpo.training import Stopped

    try:
        return job(recipe, resume=resume, accept=accept)
    except Stopped as stopped:
        last_words(str(stopped))
        raise SystemExit(stopped.code) from None
