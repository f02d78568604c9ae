"""Checkpoints: everything a run needs to go on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dpo.errors import RunError
from lora_dpo.model import INITIAL, POLICY, REFERENCE, Model, adapter_tensors, save_for_resuming
from lora_dpo.reference import BASE
from lora_dpo.run_directory import write_folder, write_text
from lora_dpo.tokenization import Branches
from lora_dpo.training.optimizer import optimizer_state, restore_optimizer

RECIPE, EXAMPLES = "recipe.yaml", "examples.safetensors"


@dataclass
class TrainingState:
    """The counters of a run. step: optimizer steps done. best: the best metric so far, and at which step.

    objective: what an objective with state handed to the next step.
    reference: the fingerprint of what was the reference when the run began. synced_at: the step after which
    the policy last became the reference; 0 where it never did.
    data, held_out, base: fingerprints of the training examples, of those held out, and of the base in memory.
    evaluated: the step after which the held-out examples were last looked at.
    skipped_steps: how many were left out because a number was none (training.on_bad_step=skip).
    watch, shift: what `Watch.state` and `Fading.state` gave.
    versions: of the libraries, and what was computed on. changes: what a resumed run was allowed to change.
    """

    step: int = 0
    tokens_per_microbatch: int = 0
    best: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    loss_scale: float = 0.0
    loss_scale_growth: int = 0
    skipped_in_a_row: int = 0
    skipped_steps: int = 0
    watch: dict[str, Any] = field(default_factory=dict)
    shift: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    held_out: str = ""
    base: str = ""
    evaluated: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    objective: dict[str, float] = field(default_factory=dict)
    reference: str = BASE
    synced_at: int = 0


@dataclass(frozen=True, eq=False)
class Origin:
    """What a run is made of, kept in each checkpoint so that a change can be named.

    recipe: as YAML. examples: "train" and "held_out", a 64-bit hash of each example [N]. synced: whether the
    reference becomes the policy now and then, and so belongs to a checkpoint.
    """

    recipe: str
    examples: dict[str, Tensor]
    synced: bool = False


def save_checkpoint(
    folder: Path, model: Model, optimizer: torch.optim.Optimizer, state: TrainingState, origin: Origin
) -> None:
    """Write a checkpoint folder, whole or not at all. Raises RunError."""
    tensors, numbers = optimizer_state(optimizer, model.trainable)

    def fill(part: Path) -> None:
        save_for_resuming(model, part / "adapter")
        if origin.synced:
            save_for_resuming(model, part / "reference", REFERENCE)
        save_file(tensors, part / "optimizer.safetensors")
        save_file(origin.examples, part / EXAMPLES)
        write_text(part / "optimizer.json", json.dumps(numbers))
        write_text(part / RECIPE, origin.recipe)
        write_text(part / "state.json", json.dumps(dataclasses.asdict(state), indent=1))

    write_folder(folder, fill, manifest=True)


def checkpoint_size(model: Model, origin: Origin) -> int:
    """About how many bytes a checkpoint takes: the adapter, two moments of each of its parameters, and with a
    reference that is synchronised, or an adapter that others are subtracted from, those.
    """
    network = model.network
    assert isinstance(network, PeftModel)
    held = set(model.policy_adapters) | (set(model.reference_adapters) if origin.synced else set())
    adapters = sum(t.nbytes for name in held for t in adapter_tensors(network, name).values())
    moments = 2 * sum(p.nbytes for p in model.trainable.values())
    return adapters + moments + sum(t.nbytes for t in origin.examples.values()) + 2**16


def read_state(folder: Path) -> TrainingState:
    """The counters of a checkpoint. Raises RunError where another version wrote them."""
    try:
        return TrainingState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder} was written by another version of lora_dpo: {error}") from error


def restore_checkpoint(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put adapter and optimizer back as they were saved; returns the counters. Raises RunError."""
    state = read_state(folder)
    try:
        restore_adapter(folder / "adapter", model)
        restore_reference(folder, model)
        tensors = load_file(folder / "optimizer.safetensors")
        numbers = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be read: {error}") from error
    restore_optimizer(optimizer, model.trainable, tensors, numbers)
    return state


def restore_reference(folder: Path, model: Model) -> None:
    """Put the reference back as it was at a checkpoint, where it had been synchronised by then."""
    if (folder / "reference").is_dir():
        restore_adapter(folder / "reference", model, REFERENCE)


def restore_adapter(folder: Path, model: Model, name: str = POLICY) -> None:
    """Copy an adapter of a checkpoint into the model's, and what it started from. Raises RunError where the
    tensors differ.
    """
    assert isinstance(model.network, PeftModel)
    _restore(folder / "adapter_model.safetensors", adapter_tensors(model.network, name))
    if INITIAL in model.policy_adapters:
        _restore(folder / f"{INITIAL}.safetensors", adapter_tensors(model.network, INITIAL))


def _restore(file: Path, own: dict[str, Tensor]) -> None:
    saved = load_file(file) if file.is_file() else {}
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())[0]
        raise RunError(f"{file} is another adapter than the recipe's: {odd} is only in one of them")
    for key, tensor in own.items():
        if saved[key].shape != tensor.shape:
            raise RunError(
                f"{file} is another adapter than the recipe's: {key} is {list(saved[key].shape)} there, and"
                f" {list(tensor.shape)} here"
            )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def data_fingerprint(branches: Sequence[Branches]) -> str:
    """A hash of every token id, scored mask and value, in order."""
    digest = hashlib.sha256()
    for item in branches:
        for part in _parts(item):
            digest.update(part)
    return digest.hexdigest()


def example_hashes(branches: Sequence[Branches]) -> Tensor:
    """A hash of each example, int64 [N]."""
    hashes = [xxhash.xxh3_64_intdigest(b"".join(_parts(item))) for item in branches]
    return torch.from_numpy(np.array(hashes, dtype=np.uint64).view(np.int64))


def _parts(item: Branches) -> Iterator[bytes]:
    for part in (item.prefix, *item.rests, *item.scored):
        yield len(part).to_bytes(8, "little") + part.tobytes()
    for name, value in sorted(item.values.items()):
        yield f"{name}={float(value).hex()};".encode()
