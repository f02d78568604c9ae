"""One parser for every door: the command line's text, YAML's values and Python's objects become typed values.

A hint is a plain type, `Annotated[type, AtLeast(…)]`, a `Literal`, a union, a tuple, or a dataclass.
Whatever does not fit raises `RecipeError` naming the key, what it got and what it takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from lora_dpo.errors import RecipeError
from lora_dpo.losses import OBJECTIVES, Objective
from lora_dpo.recipe.own import import_objective
from lora_dpo.recipe.yaml_text import parse_yaml


@dataclass(frozen=True)
class Parsed:
    """For a hint with a parser of its own: parse(value, key) → the typed value, or RecipeError."""

    parse: Callable[[Any, str], Any]
    takes: str

    def __str__(self) -> str:
        return self.takes


class Mismatch(RecipeError):
    """A value is not of the type asked for; where there are several, another may take it."""


def coerce(hint: Any, value: Any, key: str) -> Any:
    """The value as the hint's type. Text is parsed: "5e-6" is a float, "[a, b]" a tuple, "null" None."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, bound = get_args(hint)
        if isinstance(bound, Parsed):
            return bound.parse(value, key)
        try:
            number = coerce(base, value, key)
        except Mismatch:
            raise refusal(key, value, describe(hint)) from None
        if not bound.accepts(number):
            raise refusal(key, value, describe(hint))
        return number
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise refusal(key, value, describe(hint) + nearest(str(value), map(str, get_args(hint))))
    if origin in (Union, types.UnionType):
        return _coerce_union(hint, value, key)
    if origin is tuple:
        return _coerce_tuple(hint, value, key)
    if hint is Objective:
        return parse_objective(value, key)
    if dataclasses.is_dataclass(hint):
        return _coerce_dataclass(typing.cast(type, hint), value, key)
    return _coerce_plain(hint, value, key)


def _coerce_union(hint: Any, value: Any, key: str) -> Any:
    options = get_args(hint)
    if any(get_origin(option) is tuple or dataclasses.is_dataclass(option) for option in options):
        value = _structured(value, key)
    if types.NoneType in options and (value is None or value in ("null", "none", "None", "")):
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and type(value) is dict:
            return coerce(option, value, key)
    real = [option for option in options if option is not types.NoneType]
    if isinstance(value, (list, tuple)):
        # A list's own error names the item; that it isn't text either would say nothing.
        real = [option for option in real if get_origin(option) is tuple] or real
    inner = refusal(key, value, describe(hint))
    for option in real:
        try:
            return coerce(option, value, key)
        except Mismatch as error:
            inner = error
    raise inner if len(real) == 1 else refusal(key, value, describe(hint))


def _coerce_tuple(hint: Any, value: Any, key: str) -> tuple:
    value = _structured(value, key)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise refusal(key, value, describe(hint))
    return tuple(coerce(get_args(hint)[0], item, f"{key}[{n}]") for n, item in enumerate(value))


def _coerce_dataclass(cls: type, value: Any, key: str) -> Any:
    if isinstance(value, cls):
        return value
    value = _structured(value, key)
    if type(value) is not dict:  # a DatasetDict is a mapping too, of another kind
        raise refusal(key, value, f"the keys {', '.join(field_names(cls))}")
    return build(cls, value, key)


def build(cls: type, values: Mapping[str, Any], key: str) -> Any:
    """An instance of a dataclass from a mapping; unknown and missing keys are refused by name."""
    known = field_names(cls)
    for name in values:
        if name not in known:
            raise unknown_key(f"{key}.{name}" if key else name, [f"{key}.{k}" if key else k for k in known])
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise RecipeError(f"{key}.{field.name}".lstrip(".") + " is missing: it has no default")
    hints = hints_of(cls)
    return cls(**{n: coerce(hints[n], v, f"{key}.{n}".lstrip(".")) for n, v in values.items()})


def _coerce_plain(hint: Any, value: Any, key: str) -> Any:
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is str and isinstance(value, str) and value:
        return value
    if hint is bool:
        flag = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
            str(value).lower()
        )
        if flag is not None:
            return flag
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float:
                return number
            if number.is_integer():
                return int(value) if isinstance(value, (int, str)) and "." not in str(value) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise refusal(key, value, describe(hint))


def parse_objective(value: Any, key: str) -> Objective:
    """An objective from an instance, a name, or a mapping with its name under `objective`.

    The name is one of `OBJECTIVES`, or a class of the user's: "file.py:Class" or "module:Class".
    """
    if isinstance(value, Objective):
        return value
    if isinstance(value, type) and issubclass(value, Objective):
        raise refusal(key, value, f"an instance: {value.__name__}()")
    value = _structured(value, key)
    if isinstance(value, str):
        value = {"objective": value}
    if not isinstance(value, Mapping) or "objective" not in value:
        raise refusal(key, value, f"an objective: one of {', '.join(OBJECTIVES)}")
    name = str(value["objective"])
    kind = OBJECTIVES.get(name) or (import_objective(name, f"{key}.objective") if ":" in name else None)
    if kind is None:
        known = f"one of {', '.join(OBJECTIVES)}, or file.py:Class{nearest(name, OBJECTIVES)}"
        raise refusal(f"{key}.objective", name, known)
    return build(kind, {k: v for k, v in value.items() if k != "objective"}, key)


def _structured(value: Any, key: str) -> Any:
    """Text such as "[a, b]" or "{path: a}" as the list or mapping that it writes."""
    if not (isinstance(value, str) and value[:1] in "[{" and value):
        return value
    try:
        return parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {reprlib.repr(value)} is not a YAML list or mapping: {error}") from None


def hints_of(cls: type) -> dict[str, Any]:
    """The field types of a dataclass, with their bounds."""
    return typing.get_type_hints(cls, include_extras=True)


def field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def describe(hint: Any) -> str:
    """What a hint takes, in words."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, bound = get_args(hint)
        return str(bound) if isinstance(bound, Parsed) else f"{describe(base)}, {bound}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if o is types.NoneType else describe(o) for o in get_args(hint))
    if origin is tuple:
        return f"a list of {describe(get_args(hint)[0])}"
    if hint is Objective:
        return f"an objective: one of {', '.join(OBJECTIVES)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def refusal(key: str, value: Any, takes: str) -> Mismatch:
    return Mismatch(f"{key} got {reprlib.repr(value)}; it takes {takes}")


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f". Did you mean {close[0]}?" if close else ""


def unknown_key(key: str, known: Iterable[str]) -> RecipeError:
    """The error for a key that does not exist, with the one that was most likely meant."""
    key, known = str(key), list(known)
    last = key.rpartition(".")[2]
    if last in NOT_OFFERED:
        return RecipeError(f"unknown key {key}: {NOT_OFFERED[last]}")
    close = [k for k in known if k.rpartition(".")[2] == last]
    close = close or [k for name, k in ELSEWHERE.items() if name == last]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"known keys are {', '.join(known)}" if known else "there are none here"
    hint = f"did you mean {close[0]}?" if close else hint
    return RecipeError(f"unknown key {key}: {hint}")


NOT_OFFERED = {
    "bias": "trained biases of the base would still act when the adapter is off, so that the reference would"
    " not be the base; train whole modules instead, with adapter.modules_to_save",
}
"""Names that other trainers use for what is not offered here: why not, and what to take instead."""

ELSEWHERE = {
    "lr": "training.learning_rate",
    "batch_size": "training.pairs_per_step",
    "per_device_train_batch_size": "training.pairs_per_step",
    "gradient_accumulation_steps": "training.pairs_per_step",
    "num_train_epochs": "training.epochs",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "output_dir": "run_directory",
    "report_to": "training.trackers",
    "optim": "training.optimizer",
    "max_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "target_parameters": "adapter.expert_targets",
    "layers_to_transform": "adapter.layers",
    "rank_pattern": "adapter.ranks",
    "alpha_pattern": "adapter.alphas",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "init_lora_weights": "adapter.init",
    "loraplus_lr_ratio": "adapter.lora_plus_ratio",
    "trainable_token_indices": "adapter.trained_tokens",
    "model_name_or_path": "base.model",
    "load_in_4bit": "base.quantization",
    "dataset_name": "data.train",
    "loss_type": "loss",
    "ref_adapter_name": "reference.adapter",
    "ref_model": "reference.adapter",
    "sync_ref_model": "reference.sync_every",
    "ref_model_sync_steps": "reference.sync_every",
    "ref_model_mixup_alpha": "reference.sync_alpha",
}
"""Names that other trainers use, and where the same thing is set here."""
