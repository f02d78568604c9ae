"""The held-out rows that an export is compared on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lora_dpo.errors import DataError, RunError
from lora_dpo.export.proof.report import Kind
from lora_dpo.export.proof.said import spread
from lora_dpo.losses import DPO
from lora_dpo.model import load_tokenizer
from lora_dpo.recipe import Base, Data, Recipe
from lora_dpo.tokenization import Branches
from lora_dpo.training import Display, prepare_held_out


class Trained(Protocol):
    """What was exported: an adapter's folder, its base, and the run's recipe where it is a run's."""

    @property
    def adapter(self) -> Path: ...
    @property
    def base(self) -> Base: ...
    @property
    def recipe(self) -> Recipe | None: ...
    @property
    def record(self) -> Any: ...


@dataclass(frozen=True)
class Rows:
    """Held-out examples, what they were read as, and where they are from in words."""

    examples: list[Branches]
    records: str
    source: str


def rows_for(source: Trained, kind: Kind, data: str | None, examples: int, display: Display) -> Rows | str:
    """The examples to compare on; or why there are none, in words."""
    if kind not in ("merged", "adapter"):
        return f"{kind} files are not run here; their tensors are checked instead"
    try:
        rows = held_out(source, data, display)
    except DataError as error:
        if data is not None and source.recipe is None:
            raise DataError(f"{error}; an adapter without its run is compared on pairs") from error
        if data is not None:
            raise
        return f"the run's held-out rows can't be read: {error} (--data FILE gives others)"
    if not rows.examples:
        if data is not None:
            raise RunError(f"--data {data}: none of its rows can be compared on")
        who = "an adapter without its run has" if source.recipe is None else "the run has"
        return f"{who} no held-out rows: give some with --data FILE"
    return replace(rows, examples=[rows.examples[n] for n in spread(examples, len(rows.examples))])


def held_out(source: Trained, data: str | None, display: Display) -> Rows:
    """The rows that a run held out, or those of a file; of a bare adapter without a file there are none.

    Raises DataError naming file and row.
    """
    recipe, tokenizer = source.recipe, load_tokenizer(source.base)
    if recipe is None:
        if data is None:
            return Rows([], "pairs", "")
        template = source.adapter / "chat_template.jinja"
        section = Data(data, chat_template=str(template) if template.is_file() else None)
        recipe = Recipe(source.base, section, loss=DPO())
    found = prepare_held_out(
        recipe.data, recipe.loss, tokenizer, seed=recipe.training.seed, display=display, source=data
    )
    records, branches = recipe.loss.records, found.eval
    if records == "ratings":
        branches = [item.only([0]) for item in branches]  # the other side is another row's response
    return Rows(branches, records, data if data is not None else "held out by the run")
