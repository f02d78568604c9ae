"""Tiny runs to be killed, stopped and starved, and what must be true of each when it has ended."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders import pair_rows, save_small_model
from nursery import Nursery

from lora_dpo.losses import BCO, DPO
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Reference, Shift, Training, override, to_yaml
from lora_dpo.run_directory import RunDirectory, damage

TIMING = {"tokens_per_second", "pairs_per_second", "peak_memory_gib", "seconds", "seconds_left"}
"""Metrics of the machine, not of the run."""

CACHED = {"reference_cache/hit_rate"}
"""A step that is done again finds in the cache what it computed the first time."""

STEPS = 6

VARIANTS: dict[str, list[str]] = {
    "plain": ["training.save_every=1", "training.keep_checkpoints=1", "training.best_metric=loss"],
    "state": ["training.save_every=2", "training.keep_checkpoints=2"],
    "sync": ["training.save_every=1", "training.keep_checkpoints=2", "reference.sync_every=2"],
    "8bit": [
        "training.save_every=1",
        "training.keep_checkpoints=2",
        "training.optimizer=adamw_8bit",
        "adapter.rank=32",
        "training.best_metric=rewards/margin",
    ],
}
"""Plain; an objective with state; a reference that moves; moments in 8 bits (rank 32 has such tensors)."""


@dataclass
class Workshop:
    """A folder with a model, rows and recipes, and the nursery that runs them."""

    folder: Path
    nursery: Nursery
    wholes: dict[str, Ended] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_small_model(self.folder / "model")
        rows = self.folder / "pairs.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(28)))

    def recipe(self, variant: str, *changes: str) -> Recipe:
        recipe = Recipe(
            base=Base(str(self.folder / "model"), compute_dtype="float32", device="cpu"),
            data=Data(str(self.folder / "pairs.jsonl"), eval_last=4, workers=1),
            loss=BCO() if variant == "state" else DPO(),
            adapter=Adapter(rank=4, dropout=0.1),
            reference=Reference(),
            training=Training(
                pairs_per_step=6,
                learning_rate=1e-2,
                epochs=20,
                max_steps=STEPS,
                tokens_per_microbatch=200,
                eval_every=2,
            ),
            shift=Shift(prompts=2, responses=1, max_new_tokens=4),
        )
        return override(recipe, [*VARIANTS[variant], *changes])

    def begin(self, variant: str, name: str, *changes: str) -> TinyRun:
        """A run that has not begun, in a folder of its own."""
        folder = self.folder / name
        (folder / "disk").mkdir(parents=True)
        recipe = self.recipe(variant, f"run_directory={folder / 'disk' / 'run'}", *changes)
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        return TinyRun(self, folder, recipe)

    def whole(self, variant: str, *changes: str) -> Ended:
        """How the uninterrupted run ends; made once."""
        key = " ".join([variant, *changes])
        if key not in self.wholes:
            run = self.begin(variant, f"whole-{len(self.wholes)}-{variant}", *changes)
            began, child = time.monotonic(), run.go()
            code = child.wait()
            if code:
                raise RuntimeError(f"the uninterrupted run ended with {code}\n{child.stderr}")
            self.wholes[key] = run.ended(child.flags, time.monotonic() - began)
        return self.wholes[key]


@dataclass
class Ended:
    """What is compared: the adapter's SHA-256 and the metrics without timing.

    flags, seconds: of the process, where it was only one.
    """

    sha256: str
    records: list[dict[str, Any]]
    flags: Any = None
    seconds: float = 0.0


@dataclass
class TinyRun:
    """One run, over as many processes as it takes.

    folder: disk/run/ and disk/cache/, all that the run writes, and a folder of each process.
    """

    workshop: Workshop
    folder: Path
    recipe: Recipe

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.disk / "run")

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def begun(self) -> bool:
        return self.directory.recipe_file.exists() or bool(self.directory.checkpoints())

    def go(self, **named: Any):
        """Train in a child: from the start, or on from where it is."""
        words = ["train", self.folder / "recipe.yaml", *(["--resume"] if self.begun else [])]
        return self.run(*words, **named)

    def run(self, *words: object, **named: Any):
        return self.workshop.nursery.start(words, self.folder, cache=self.disk / "cache", **named)

    def newest_whole(self) -> int:
        """The step of the newest checkpoint that verifies; 0 where there is none."""
        for folder in reversed(self.directory.checkpoints()):
            if damage(folder) is None:
                return int(folder.name.removeprefix("step-"))
        return 0

    def last_step(self) -> int:
        return max((r["step"] for r in self.directory.records()), default=0)

    def ended(self, flags: Any = None, seconds: float = 0.0) -> Ended:
        file = self.directory.adapter_folder / "adapter_model.safetensors"
        records = [{k: v for k, v in r.items() if k not in TIMING | CACHED} for r in self.directory.records()]
        return Ended(hashlib.sha256(file.read_bytes()).hexdigest(), records, flags, seconds)

    def faults(self, whole: Ended) -> list[str]:
        """What is not as after the uninterrupted run."""
        now, wrong = self.ended(), []
        if now.sha256 != whole.sha256:
            wrong.append("another adapter than the uninterrupted run's")
        places, expected = (
            [(r["kind"], r["step"]) for r in records] for records in (now.records, whole.records)
        )
        if places != expected:
            wrong.append(f"metrics.jsonl has {places} instead of {expected}")
        elif now.records != whole.records:
            keys = {k for a, b in zip(now.records, whole.records, strict=True) for k in a if a[k] != b.get(k)}
            wrong.append(f"metrics.jsonl has other values of {sorted(keys)}")
        wrong += [f"{left.name} was left" for left in self.litter()]
        if (newest := self.newest_whole()) != self.recipe.training.max_steps:
            wrong.append(f"the newest whole checkpoint is of step {newest}")
        return wrong

    def litter(self) -> list[Path]:
        """What is half-written. A process killed while it writes tokens to the cache leaves a .part there."""
        ends = (".part", ".old", ".gone", ".tmp")
        found = [path for path in self.directory.path.rglob("*") if path.name.endswith(ends)]
        return found + [p for p in (self.disk / "cache").rglob("*") if p.name.endswith(("-wal", "-journal"))]
