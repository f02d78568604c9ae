"""A loop's judges: looked at before anything is sampled, and the same from its first round to its last."""

from __future__ import annotations

from pathlib import Path

from lora_dpo.errors import RunError, UserError
from lora_dpo.finished import check_adapter
from lora_dpo.judging import JudgeProtocol, make_judge, read_samples, tag
from lora_dpo.model import find_adapter
from lora_dpo.recipe import IterativeRecipe, Judge
from lora_dpo.run_directory import RunDirectory


def check_judges(recipe: IterativeRecipe) -> None:
    """Raise UserError for a judge that cannot be had: hours of sampling would come before it is asked."""
    _check(recipe.judge)
    if recipe.held_out_judge is not None:
        try:
            _check(recipe.held_out_judge)
        except UserError as error:
            raise type(error)(str(error).replace("judge.of", "rounds.held_out_judge", 1)) from error


def _check(judge: Judge) -> None:
    """A classifier is not loaded for this: that would take as long as to use it."""
    if judge.kind in ("function", "endpoint"):
        make_judge(judge)
    elif judge.kind == "reward":
        find_adapter(judge.what, "judge.of")
    elif judge.kind == "implicit" and judge.what:
        check_adapter(RunDirectory.open(judge.what))


def same_judge(judge: Judge, made: JudgeProtocol, first: Path) -> JudgeProtocol:
    """The judge, if it is the one that measured where the loop began: rewards of two cannot be compared.

    first: what that one wrote. An implicit reward of the policy is the policy's own, and another one in each
    round. Raises RunError where it is another one now.
    """
    if judge.of == "implicit" or not first.exists():
        return made
    before = next((row.line.get("judge") for row in read_samples(first)), None)
    if before is not None and before != tag(made):
        raise RunError(
            f"the judge {judge.of} is {tag(made)} now, and was {before} when these rounds began: what they"
            " say cannot be compared. Put it back, or begin other rounds with run_directory=…"
        )
    return made
