"""Who speaks in which round, and what the round trains: every policy is an adapter on the one base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lora_dpo.finished import check_adapter
from lora_dpo.model import Model, bare, load_adapter
from lora_dpo.preferences import Prompt
from lora_dpo.recipe import Adapter, IterativeRecipe, Recipe, Reference
from lora_dpo.rounds.directory import LoopDirectory
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Display


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop that runs. base: the only model in memory, alone between stages. fingerprint: its hash. accept:
    keys of its runs' recipes that may differ from those that they began with.
    """

    recipe: IterativeRecipe
    directory: LoopDirectory
    base: Model
    fingerprint: str
    chat: ChatTokenizer
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    display: Display
    accept: Sequence[str] = ()

    def adapter_after(self, number: int) -> str | None:
        """The adapter that the policy was after a round; None where it was the base."""
        if number == 0:
            return self.recipe.adapter.start_from
        return str(self.directory.round(number).run.adapter_folder)

    @contextmanager
    def policy_after(self, number: int) -> Iterator[Model]:
        """The base with that adapter on, frozen, its reference the base; alone again afterwards."""
        folder = self.adapter_after(number)
        if number:
            check_adapter(self.directory.round(number).run)
        try:
            yield self.base if folder is None else load_adapter(self.base, folder)
        finally:
            bare(self.base)


def recipe_of_round(
    recipe: IterativeRecipe,
    number: int,
    *,
    last: str | None,
    pairs: Sequence[Path],
    held_out: Path | None,
    run: Path,
) -> Recipe:
    """The recipe that a round's training is, and that its run directory records.

    last: the adapter of the policy before, if it had one. pairs, held_out: preference files.
    """
    rounds, training = recipe.rounds, recipe.training
    given = {item.name: getattr(recipe, item.name) for item in fields(Recipe)}
    # What was sampled was cut already, and rows are chosen by the pairing: the recipe's caps are on prompts.
    data = replace(
        recipe.data,
        train=tuple(map(str, pairs)),
        eval=str(held_out) if held_out is not None else (),
        eval_fraction=0.0,
        eval_last=0,
        max_rows=None,
        max_eval_rows=None,
        on_bad_row="skip",
    )
    if held_out is None:
        training = replace(training, eval_every=0, best_metric=None, early_stopping=0)
    adapter, reference = _adapter(recipe.adapter, rounds.adapter, last), Reference(kind="base")
    if rounds.reference == "last" and last is not None:
        started = adapter.start_from == last
        reference = Reference(kind="start") if started else Reference(kind="adapter", adapter=last)
    given |= {
        "data": data,
        "adapter": adapter,
        "reference": reference,
        "training": replace(training, seed=(training.seed + number) % 2**63),
        "run_directory": str(run),
    }
    return Recipe(**given)


def _adapter(adapter: Adapter, how: str, last: str | None) -> Adapter:
    if how == "fresh" or last is None:
        return replace(adapter, start_from=None)
    # What an adapter is stands in its folder; of the recipe's keys only how it is trained still counts.
    return Adapter(start_from=last, dropout=adapter.dropout, lora_plus_ratio=adapter.lora_plus_ratio)
