"""What is known of an exported folder: read from the run, the adapter and the base, never made up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from lora_dpo.export.card.licence import Licence, licence_of
from lora_dpo.export.card.names import hub_model, public_base
from lora_dpo.model.score import TASK
from lora_dpo.recipe import Base, Recipe
from lora_dpo.run_directory import RunDirectory

if TYPE_CHECKING:
    from lora_dpo.export.source import Source

Kind = Literal["adapter", "merged", "gguf", "gguf-adapter", "ollama"]
SAME = 0.01
"""Two evaluations of one adapter on the same rows agree in their loss to this share: packings differ."""


@dataclass(frozen=True, eq=False)
class Facts:
    """All that a card may say.

    base_id: the base's hub id, None for a local one; base_name: what it is called. trained_on: the
    adapter's trained_on.json; adapter: its adapter_config.json; both empty where they are missing. records:
    the run's metrics. evaluation: its evaluation.json. examples: how many it trained on and held out, where a
    checkpoint still tells. report: what the export measured. repository: where the folder will be pushed to.
    """

    kind: Kind
    folder: Path
    base: Base
    recipe: Recipe | None
    base_id: str | None
    base_name: str
    trained_on: Mapping[str, Any]
    adapter: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None
    examples: tuple[int, int] | None
    report: Mapping[str, Any] | None
    licence: Licence
    repository: str | None = None

    @property
    def commit(self) -> str | None:
        return text_of(mapping_of(self.trained_on.get("base")).get("commit"))

    @property
    def quantization(self) -> str:
        return text_of(self.trained_on.get("quantization")) or self.base.quantization

    @property
    def is_adapter(self) -> bool:
        """Whether the folder needs the base beside it."""
        modelfile = self.folder / "Modelfile"
        if self.kind == "ollama" and modelfile.is_file():
            lines = modelfile.read_text(encoding="utf-8", errors="replace").splitlines()
            return any(line.upper().startswith("ADAPTER ") for line in lines)
        return self.kind in ("adapter", "gguf-adapter")

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model: an adapter with a scalar head."""
        return self.adapter.get("task_type") == TASK

    @property
    def kept_evaluation(self) -> Mapping[str, Any] | None:
        """The metrics' evaluation of the adapter that was kept: the best by best_metric, else the last."""
        found = [r for r in self.records if r.get("kind") == "evaluation"]
        metric = None if self.recipe is None else self.recipe.training.best_metric
        if metric is not None:
            known = [r for r in found if number_of(r.get(f"eval/{metric}")) is not None]
            better = min if metric == "loss" else max
            return better(known, key=lambda r: r[f"eval/{metric}"], default=None)
        return found[-1] if found else None

    @property
    def on_own_rows(self) -> bool:
        """Whether evaluation.json is of the rows that the run held out: eval --data takes others."""
        if self.evaluation is None or self.kept_evaluation is None or self.evaluation.get("source"):
            return False
        if self.examples is not None and self.evaluation.get("examples") != self.examples[1]:
            return False
        then = number_of(self.kept_evaluation.get("eval/loss"))
        now = number_of(mapping_of(mapping_of(self.evaluation.get("metrics")).get("loss")).get("mean"))
        return then is not None and now is not None and math.isclose(then, now, rel_tol=SAME, abs_tol=1e-3)


def gather(
    folder: Path, source: Source, report: Mapping[str, Any] | None, kind: Kind, repository: str | None = None
) -> Facts:
    """Everything that is known of an export. Files that are missing or damaged leave their facts out."""
    trained_on = read_json(source.adapter / "trained_on.json")
    commit = text_of(mapping_of(trained_on.get("base")).get("commit"))
    base: Base = source.base
    base_id = hub_model(base.model) or (base.model if commit and "/" not in base.model else None)
    run: RunDirectory | None = source.run
    return Facts(
        kind=kind,
        folder=folder,
        base=base,
        recipe=source.recipe,
        base_id=base_id,
        base_name=base_id or public_base(base.model),
        trained_on=trained_on,
        adapter=read_json(source.adapter / "adapter_config.json"),
        records=[] if run is None else records_of(run),
        evaluation=None if run is None else (read_json(run.evaluation_file) or None),
        examples=None if run is None else counted(run),
        report=report,
        licence=licence_of(base, base_id, commit),
        repository=repository,
    )


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON file's mapping; empty where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return mapping_of(values)


def records_of(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        return list(run.records())
    except OSError:
        return []


def counted(run: RunDirectory) -> tuple[int, int] | None:
    """How many examples the run trained on and held out, as its newest checkpoint tells."""
    for checkpoint in reversed(run.checkpoints()):
        try:
            with safe_open(checkpoint / "examples.safetensors", "pt") as tensors:
                train, held_out = (tensors.get_slice(name).get_shape()[0] for name in ("train", "held_out"))
            return int(train), int(held_out)
        except (OSError, SafetensorError, IndexError):
            continue
    return None


def mapping_of(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def number_of(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
