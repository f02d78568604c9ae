"""What is exported: an adapter, and the base that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora_dpo.errors import ModelError, RunError
from lora_dpo.finished import check_adapter, check_whole
from lora_dpo.model.saved import CONFIG, find_adapter
from lora_dpo.model.score import TASK
from lora_dpo.model.trained_on import TrainedOn, base_notes, check_base, read_record
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base, Recipe, load_recipe
from lora_dpo.run_directory import RunDirectory


@dataclass(frozen=True)
class Source:
    """adapter: a folder in PEFT's layout. base: as it was trained on. run, recipe: where it is a run's.

    record: what the adapter's folder says of its base; None where it says nothing.
    """

    adapter: Path
    base: Base
    run: RunDirectory | None = None
    recipe: Recipe | None = None
    record: TrainedOn | None = None

    @property
    def notes(self) -> list[str]:
        """What could not be checked of the base, and what is otherwise than in training, a line each."""
        what = f"the adapter in {self.adapter}"
        if self.record is not None:
            return base_notes(self.record, self.base, what)
        if self.run is not None:
            return []
        stored = "unquantized" if self.base.quantization == "none" else f"in {self.base.quantization}"
        return [
            f"note: {what} doesn't say which weights it was trained on: {self.base.model} is taken for them,"
            f" {stored} (--base-model and --quantization name others)"
        ]

    @property
    def name(self) -> str:
        """What an exported file is called by default."""
        folder = self.adapter if self.run is None else self.run.path
        return folder.resolve().name

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model: an adapter with a scalar head, which writes no text."""
        return read_json(self.adapter / CONFIG, "export").get("task_type") == TASK


def find_source(
    path: str | Path, *, base_model: str | None = None, quantization: str | None = None
) -> Source:
    """The run, or the adapter's folder, at a path.

    base_model: a folder or hub id instead of the one that the run or the adapter names: a base that moved.
    quantization: of a bare adapter whose folder doesn't say. Raises RunError or ModelError where there is
    none, it is damaged, or the base is not the one that it was trained on.
    """
    path = Path(path).expanduser()
    if (path / "recipe.yaml").is_file():
        run = RunDirectory.open(path)
        check_adapter(run)
        if quantization is not None:
            raise RunError("--quantization is for adapters made elsewhere: a run's recipe says how it was")
        recipe = load_recipe(run.recipe_file)
        adapter, base = run.adapter_folder, recipe.base
    elif path.is_dir():
        run = recipe = None
        adapter = find_adapter(str(path), "export")
        check_whole(adapter)
        base = _named_base(adapter, base_model, quantization)
    else:
        raise RunError(f"export takes a run directory or an adapter's folder, and {path} is neither")
    record = read_record(adapter)
    if base_model is not None:
        base = replace(base, model=base_model, revision=None)
    if record is not None and base.compute_dtype == "auto":
        base = replace(base, compute_dtype=record.compute_dtype)  # pyright: ignore[reportArgumentType]
    check_base(record, base, f"the adapter in {adapter}")
    if recipe is not None:
        recipe = replace(recipe, base=base)
    return Source(adapter, base, run, recipe, record)


def _named_base(adapter: Path, base_model: str | None, quantization: str | None) -> Base:
    """The base of an adapter's folder: what is given, else what the folder says, if that is a folder too.

    An adapter may be anybody's: what it names is not downloaded unless somebody asks for it.
    """
    record = read_record(adapter)
    named = read_json(adapter / CONFIG, "export").get("base_model_name_or_path")
    model = base_model or (record.model if record else None) or (named if isinstance(named, str) else None)
    if not model:
        raise ModelError(f"the adapter in {adapter} does not name its base: give it with --base-model")
    if base_model is None and not Path(model).expanduser().is_dir():
        raise ModelError(
            f"the adapter in {adapter} names {model!r:.80} as its base, which is no folder here: give the"
            " base's folder or hub id with --base-model"
        )
    if record is None:
        return Base(model, quantization=quantization or "none")  # pyright: ignore[reportArgumentType]
    return Base(
        model,
        quantization=quantization or record.quantization,  # pyright: ignore[reportArgumentType]
        double_quantization=record.double_quantization,
    )
