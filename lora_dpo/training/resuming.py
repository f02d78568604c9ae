"""A resumed run is the run that began: what differs is named, and refused unless it is meant."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_dpo.errors import RunError
from lora_dpo.model import Model
from lora_dpo.recipe import Recipe, load_recipe, to_dict
from lora_dpo.tokenization import Branches
from lora_dpo.training.checkpoint import EXAMPLES, RECIPE, TrainingState, example_hashes
from lora_dpo.training.data import TrainingData
from lora_dpo.training.observers import flat

MAY_CHANGE = {
    "run_directory",
    "data.workers",
    "training.tokens_per_microbatch",
    "training.gradient_checkpointing",
    "training.save_every",
    "training.keep_checkpoints",
    "training.on_bad_step",
    "training.trackers",
    "training.reference_cache",
    "shift.prompts",
    "shift.responses",
    "shift.max_new_tokens",
    "shift.every",
}
"""Keys that a resumed run may change: they don't touch what is learned."""


@dataclass(frozen=True)
class Difference:
    """what: a key of the recipe, or data, base or reference. then_and_now: in words."""

    what: str
    then_and_now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then_and_now}"

    def accepted(self, accept: Sequence[str]) -> bool:
        """Whether it, or the section that it is in, is named."""
        return any(self.what == name or self.what.startswith(f"{name}.") for name in accept)


def recipe_differences(now: Recipe, recorded: Path) -> list[Difference]:
    """Keys on which what is learned depends and that aren't those of a recorded recipe."""
    new, old = flat(to_dict(now)), flat(to_dict(load_recipe(recorded)))
    keys = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    return [Difference(key, f"{old.get(key)} → {new.get(key)}") for key in keys if key not in MAY_CHANGE]


def checkpoint_differences(
    folder: Path, recipe: Recipe, then: TrainingState, now: TrainingState, data: TrainingData
) -> Iterator[Difference]:
    """What a whole checkpoint was made with and is otherwise now."""
    yield from recipe_differences(recipe, folder / RECIPE)
    if then.data != now.data:
        yield Difference("data", _examples("training", folder, "train", data.train))
    if then.held_out != now.held_out:
        yield Difference("data.eval", _examples("held-out", folder, "held_out", data.eval))
    if then.base != now.base:
        yield Difference("base", _base(recipe, then, now))
    if then.reference != now.reference:
        yield Difference("reference", _reference(recipe))


def refuse(differences: Sequence[Difference], accept: Sequence[str]) -> list[Difference]:
    """The differences, all of them accepted. Raises RunError, naming those that aren't."""
    for item in differences:
        if item.what == "training.optimizer":
            raise RunError(
                f"--resume: {item}. One optimizer can't go on with what another one kept: put it back, or"
                " begin a new run with adapter.start_from=RUN"
            )
    left = [item for item in differences if not item.accepted(accept)]
    if left:
        names = ",".join(dict.fromkeys(item.what for item in left))
        raise RunError(
            f"--resume: this is not the run that began. {'; '.join(map(str, left))}. Put it back, begin a new"
            f" run with run_directory=…, or, if it is meant: --resume --accept {names}"
        )
    return list(differences)


def go_on(
    then: TrainingState, now: TrainingState, differ: Sequence[Difference], say: Callable[[str], None]
) -> None:
    """Make a checkpoint's counters those of the run that goes on from it, as the recipe is now.

    differ: what was accepted to be otherwise; it is told, and kept in `changes`.
    """
    for item in differ:
        say(f"accepted: {item}")
    say_other_versions(then.versions, now.versions, say)
    then.changes += [f"after step {then.step}: {item}" for item in differ]
    # A smaller budget in the recipe counts, and so does one that was halved for want of memory.
    then.tokens_per_microbatch = min(then.tokens_per_microbatch, now.tokens_per_microbatch)
    for name in ("data", "held_out", "base", "reference", "versions"):
        setattr(then, name, getattr(now, name))


def _examples(kind: str, folder: Path, name: str, branches: Sequence[Branches]) -> str:
    """How the examples differ from the checkpoint's, with the file and row of the first that does."""
    counts = f"the {kind} data are not those that the run began with"
    try:
        then = load_file(folder / EXAMPLES)[name]
    except (OSError, SafetensorError, KeyError):
        return counts
    now = example_hashes(branches)
    if len(then) != len(now):
        counts += f" ({len(then):,} examples then, {len(now):,} now)"
    elif torch.equal(then.sort().values, now.sort().values):
        return f"{counts}: the same examples, in another order"
    return counts + _first_difference(then, now, branches)


def _first_difference(then: Tensor, now: Tensor, branches: Sequence[Branches]) -> str:
    shorter = min(len(then), len(now))
    differ = (then[:shorter] != now[:shorter]).nonzero()
    place = int(differ[0]) if len(differ) else shorter
    if place >= len(branches):
        return f"; number {place + 1} and what follows are gone"
    return f"; the first that differs is {branches[place].where}"


def _base(recipe: Recipe, then: TrainingState, now: TrainingState) -> str:
    dtypes = then.versions.get("compute dtype"), now.versions.get("compute dtype")
    if dtypes[0] != dtypes[1]:
        return f"it computes in {dtypes[1]} here, and in {dtypes[0]} then: set base.compute_dtype={dtypes[0]}"
    return f"the weights of {recipe.base.model}, as they lie in memory, are not those that the run began with"


def _reference(recipe: Recipe) -> str:
    folder = recipe.reference.adapter or recipe.adapter.start_from
    text = "it is not the one that the run began with"
    return f"{text}: the adapter in {folder} was changed since" if folder else text


PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "lora-dpo")


def versions(model: Model) -> dict[str, str]:
    """What the bits of a result depend on beside the run itself."""
    found = {"compute dtype": str(model.compute_dtype).removeprefix("torch.")}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    found["device"] = f"{model.device.type} {device}"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


def say_other_versions(then: Mapping[str, str], now: Mapping[str, str], say: Callable[[str], None]) -> None:
    """A note where the run goes on with other libraries, or elsewhere."""
    changed = [f"{k} {then[k]} → {now[k]}" for k in then.keys() & now.keys() if then[k] != now[k]]
    if changed:
        say(f"note: {', '.join(sorted(changed))} since the checkpoint: going on, though not bit for bit")
