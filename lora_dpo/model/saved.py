"""Adapters on disk, in PEFT's layout: found, checked, read and written; `placing` puts one on a base.

The name under which an adapter was saved doesn't matter: names on disk don't hold it.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dpo.errors import ModelError, RecipeError
from lora_dpo.model.adapter_config import check_tensors, lora_config
from lora_dpo.model.score import (
    KEY,
    SCORE,
    TASK,
    Kind,
    check_kind,
    check_score,
)
from lora_dpo.model.trained_on import TrainedOn, read_record
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

REWRITES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""peft's initialisations that change the base's weights: the adapter alone is then not what was trained."""

REFUSED = {
    "bias": "it trained biases of the base itself, so that adapters off is no longer the base",
    "lora_bias": "it has biases beside its factors, which are not trained here",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it is on for a part of the tokens only",
    "ensure_weight_tying": "it ties its own copies of embeddings and head",
    "use_qalora": "it is of a kind (QALoRA) that is not trained here",
    "use_bdlora": "it is of a kind (BD-LoRA) that is not trained here",
    "arrow_config": "it is a router over other adapters",
    "kasa_config": "it is of a kind (KaSA) that is not trained here",
    "velora_config": "it is of a kind (VeLoRA) that is not trained here",
    "monteclora_config": "it is of a kind (MonteCLoRA) that is not trained here",
}
"""Keys of an adapter's config that must be off, and what it means where one is on."""

STAY_THE_RECIPES = {"start_from", "dropout", "lora_plus_ratio"}
"""Keys under `adapter` that say how it is trained, not what it is: they hold for one from a folder too."""


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """An adapter's config as peft reads it, its tensors by their names on disk. key, folder: where from.

    record: what it was trained on, where its folder says so.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    key: str
    folder: str
    record: TrainedOn | None = None

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model's, with a score head."""
        return KEY in self.tensors


def find_adapter(path: str, key: str) -> Path:
    """The folder with the adapter's files: the one given, a run directory's, or the only one inside.

    key: the recipe's, for errors. Raises ModelError where there is none, or more than one.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"{key} got {path!r}; it takes a local folder: an adapter in PEFT's layout, or a run's"
        )
    if (folder / "recipe.yaml").is_file():
        folder = folder / "adapter"
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{key}: the run in {path} holds no trained adapter yet")
    if (folder / CONFIG).is_file():
        return folder
    inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise ModelError(f"{key}: there is no {CONFIG} in {path}")
    if len(inside) > 1:
        names = ", ".join(str(inner) for inner in inside)
        raise ModelError(f"{key}: {path} holds several adapters; name one of {names}")
    return inside[0]


def read_adapter(path: str, key: str, *, shapes_only: bool = False, kind: Kind = "policy") -> SavedAdapter:
    """An adapter from its folder. Raises ModelError for what can't be used, with the reason.

    shapes_only: its tensors come without values, on the meta device. kind: whose adapter it must be.
    """
    folder = find_adapter(path, key)
    what = called(key, folder)
    values = read_json(folder / CONFIG, key)
    _refuse_unusual(values, what)
    check_kind(values, kind, what)
    if not (folder / TENSORS).is_file():
        raise ModelError(f"{key}: there is no {TENSORS} in {folder} (pickled .bin files are not opened)")
    config = lora_config(values, what)
    try:
        tensors = _shapes(folder / TENSORS) if shapes_only else load_file(folder / TENSORS)
    except Exception as error:  # what safetensors and torch raise over odd headers is of many kinds
        raise ModelError(f"{key}: {folder / TENSORS} cannot be read: {error}") from error
    check_tensors(config, tensors, what)
    if config.task_type == TASK:
        check_score(tensors, what)
        # PEFT names both heads that such a model might have; a second one is no part of any base here.
        kept = {name for name in config.modules_to_save or () if name != "classifier"}
        config.modules_to_save = sorted(kept | {SCORE})
    return SavedAdapter(config, tensors, key, str(folder), read_record(folder))


def with_new_score(saved: SavedAdapter, width: int) -> SavedAdapter:
    """The adapter as a reward model's: with a score head of zeros where it has none."""
    if saved.is_reward:
        return saved
    config = copy.deepcopy(saved.config)
    config.modules_to_save = [*(config.modules_to_save or ()), SCORE]
    return dataclasses.replace(saved, config=config, tensors={**saved.tensors, KEY: torch.zeros(1, width)})


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a file on the meta device, in float32."""
    with safe_open(file, "pt") as content:
        names: list[str] = content.keys()  # pyright: ignore[reportAttributeAccessIssue]
        slices = {name: content.get_slice(name) for name in names}
        for name, found in slices.items():
            if not found.get_dtype().startswith(("F", "BF")):
                raise ValueError(f"{name} holds {found.get_dtype()}, no real numbers")
        return {name: torch.empty(found.get_shape(), device="meta") for name, found in slices.items()}


def _refuse_unusual(values: dict[str, Any], what: str) -> None:
    kind, task = (str(values[name]) if values.get(name) else None for name in ("peft_type", "task_type"))
    if kind != "LORA":
        raise ModelError(f"{what} is of the kind {kind}; LoRA adapters are taken")
    if task not in (None, "CAUSAL_LM", TASK):
        raise ModelError(f"{what} was trained for {task}; those of causal language models are taken")
    for name, why in REFUSED.items():
        if values.get(name) not in (None, False, "none", [], {}):
            raise ModelError(f"{what} cannot be used: {why} ({name})")
    init = str(values.get("init_lora_weights")).lower()
    if init.startswith(REWRITES_THE_BASE):
        raise ModelError(
            f"{what} belongs to a base that its initialisation ({init}) rewrote, not to the one here: convert"
            " it to plain LoRA when saving (peft's path_initial_model_for_weight_conversion)"
        )


def check_left_out(adapter: Adapter, saved: SavedAdapter) -> None:
    """Raise RecipeError where the recipe sets a key to something else than the adapter in the folder has.

    A key at its default counts as left out.
    """
    has = {
        "rank": saved.config.r,
        "alpha": float(saved.config.lora_alpha),
        "targets": _names(saved.config.target_modules),
    }
    usual = Adapter()
    for item in dataclasses.fields(adapter):
        name, given = item.name, getattr(adapter, item.name)
        if name in STAY_THE_RECIPES or given == getattr(usual, name):
            continue
        if name in has and _names(given) == has[name]:
            continue
        there = f" (there: {has[name]})" if name in has else ""
        raise RecipeError(
            f"adapter.{name} got {given!r}, but with adapter.start_from the adapter is the one in"
            f" {saved.folder}{there}: leave adapter.{name} out"
        )


def _names(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, (set, list, tuple)) else targets


def called(key: str, folder: Path | str) -> str:
    """An adapter in an error: by the recipe's key that named it, where one did."""
    return f"{key} in {folder}" if key.startswith("the ") else f"{key}: the adapter in {folder}"


def adapter_tensors(network: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by their names on disk, sharing memory with the model's own."""
    return get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)


def in_memory(network: PeftModel, name: str) -> SavedAdapter:
    """An adapter of the model as if it had been read from a folder."""
    config = cast(LoraConfig, network.peft_config[name])
    return SavedAdapter(config, adapter_tensors(network, name), "adapter", "memory")


def write_adapter(network: PeftModel, name: str, folder: Path) -> None:
    """Write an adapter in PEFT's layout, whatever its name, straight into the folder."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_tensors(network, name).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = copy.copy(network.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
