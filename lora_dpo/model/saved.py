"""Adapters on disk, in PEFT's layout: found, checked, and put on a base complete.

Complete is LoRA's factors, those of embeddings too, trained tokens and whole saved modules. The name under
which an adapter was saved doesn't matter: names on disk don't hold it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_dpo.errors import ModelError, RecipeError
from lora_dpo.model.adapter_config import check_tensors, lora_config
from lora_dpo.model.score import (
    KEY,
    SCORE,
    TASK,
    Kind,
    add_score_head,
    check_kind,
    check_score,
    holds_score,
    tell_task,
)
from lora_dpo.model.trained_on import TrainedOn, read_record
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

HALF = (torch.bfloat16, torch.float16)

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


def put_on(
    network: PreTrainedModel | PeftModel,
    saved: SavedAdapter,
    name: str,
    *,
    compute_dtype: torch.dtype,
    trainable: bool,
    dropout: float = 0.0,
) -> PeftModel:
    """Add an adapter to a model under a name, its values float32; what was there keeps its requires_grad.

    Raises ModelError where adapter and base don't fit, or some tensor finds no place.
    """
    if saved.config.use_dora and isinstance(network, PeftModel) and _in_int8(network):
        # peft dequantizes the weight for DoRA's magnitudes, and the second time loses its scales.
        raise _does_not_fit(saved, "DoRA beside another adapter needs base.quantization=nf4, fp4 or none")
    config = copy.deepcopy(saved.config)
    config.inference_mode = not trainable
    config.lora_dropout = dropout
    config.init_lora_weights = True  # every value is replaced: only the quickest counts
    config.task_type = "CAUSAL_LM"
    config.revision = None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    if holds_score(config.modules_to_save):
        causal = network.get_base_model() if isinstance(network, PeftModel) else network
        add_score_head(cast(PreTrainedModel, causal))
    # peft freezes or thaws what is there already: saved modules of the adapter that is on, above all.
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        adapted = _added(network, config, name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a config that is anybody's makes peft raise anything
        raise _does_not_fit(saved, f"{error}") from error
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    tell_task(adapted, name)
    ask_for_own_tokens(adapted)
    new = parameters_of(adapted, name)
    widen_copies(adapted)
    for parameter in new.values():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(trainable)
    _fill(adapted, saved, name, new)
    return adapted


def _in_int8(network: nn.Module) -> bool:
    return any(isinstance(module, bnb.nn.Linear8bitLt) for module in network.modules())


def parameters_of(network: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the model, found by where they sit."""
    own: set[int] = set()
    for module in network.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for where in module.adapter_layer_names:
                held = attrgetter(where)(module)
                part = held[name] if name in held else nn.Module()
                parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
                own |= {id(parameter) for parameter in parameters}
    return {n: p for n, p in network.named_parameters() if id(p) in own}


def _added(network: PreTrainedModel | PeftModel, config: LoraConfig, name: str) -> PeftModel:
    with warnings.catch_warnings():
        # peft asks transformers about checkpointing by an older name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        if not isinstance(network, PeftModel):
            config.base_model_name_or_path = None
            return cast(PeftModel, get_peft_model(network, config, adapter_name=name))
        config.base_model_name_or_path = next(iter(network.peft_config.values())).base_model_name_or_path
        network.add_adapter(name, config)
        return network


def _fill(network: PeftModel, saved: SavedAdapter, name: str, own: dict[str, nn.Parameter]) -> None:
    """Copy the saved values in; every tensor must find its place and every place its tensor."""
    base = {n: p for n, p in network.named_parameters(remove_duplicate=False) if n not in own}
    tensors = dict(saved.tensors)
    for key in tensors.keys() & base.keys():
        # peft saves whole embeddings where they were targeted or resized, and would write them to the base.
        value = tensors.pop(key)
        # On the meta device there is nothing to compare with: a merge does it with the base's files.
        known = not base[key].is_meta
        if value.shape != base[key].shape or (known and not torch.equal(value.to(base[key]), base[key])):
            raise _does_not_fit(saved, f"it brings another {key.removeprefix('base_model.model.')}")
    try:
        result = set_peft_model_state_dict(network, tensors, adapter_name=name)
    except KeyError as error:
        raise _does_not_fit(saved, f"it lacks {error}") from error
    except RuntimeError as error:
        raise _does_not_fit(saved, _shapes_in_words(str(error))) from error
    missing = [n for n in result.missing_keys if n in own]
    if missing or result.unexpected_keys:
        reason = f"it lacks {missing[0]}" if missing else f"there is no place for {result.unexpected_keys[0]}"
        raise _does_not_fit(saved, reason)


def _shapes_in_words(text: str) -> str:
    """What torch says of tensors whose shapes differ, the first of them in words."""
    found = _MISMATCH.findall(text)
    if not found:
        return " ".join(text.split())
    name, there, here = found[0]
    more = f", and {len(found) - 1} others differ too" if len(found) > 1 else ""
    name = re.sub(r"(\.lora_[AB])\.\w+\.", r"\1.", name.removeprefix("base_model.model."))
    return f"its {name} is {there}, and by this base and its config it has to be {here}{more}"


_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


def _does_not_fit(saved: SavedAdapter, reason: str) -> ModelError:
    return ModelError(f"{called(saved.key, saved.folder)} does not fit this base: {reason}")


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


def ask_for_own_tokens(network: PeftModel) -> None:
    """Let modules with trained tokens answer for the adapters that have some there.

    peft asks each of them for the tokens of every adapter, and fails where one has none.
    """
    for module in network.modules():
        if isinstance(module, TrainableTokensWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                setattr(module, method, _OwnTokens(module, method))


class _OwnTokens:
    """A method of peft's wrapper, for the adapters that it holds; nothing for the others."""

    def __init__(self, wrapper: Any, method: str):
        self.wrapper, self.method = wrapper, method

    def __call__(self, adapter_name: str, *arguments: Any) -> dict[str, Any]:
        if adapter_name not in self.wrapper._get_available_adapters():
            return {}
        return getattr(type(self.wrapper), self.method)(self.wrapper, adapter_name, *arguments)


def widen_copies(network: PeftModel) -> None:
    """Saved modules in float32, which updates at DPO's rates need; see `copies` for what they compute in."""
    for module in network.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
                if parameter.dtype in HALF:
                    parameter.data = parameter.data.float()
