"""The adapter_config.json of an adapter that may be anybody's: what of it is taken, and what is refused.

Only what says which modules are adapted, and how, is handed to peft. The base that it names is never looked
up, and modules that it would have peft import (megatron_core) are not imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor

from lora_dpo.errors import ModelError

if sys.version_info >= (3, 11):
    from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
else:
    import sre_parse as _parser

IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}
"""How it began, where it came from, and what would be imported: nothing that the adapter now is."""

MOST_RANK = 2**16
MOST_ROWS = 2**20


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e9 and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and len(value) < MOST_ROWS and all(isinstance(name, str) for name in value)
    )


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) < MOST_ROWS and all(map(_is_index, value))


def _by_name(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (f"a whole number from 1 to {MOST_RANK}", _is_count),
    "lora_alpha": ("a finite number", _is_alpha),
    "rank_pattern": ("whole numbers by module name", _by_name(_is_count)),
    "alpha_pattern": ("numbers by module name", _by_name(_is_alpha)),
    "target_modules": ("names or a pattern", _is_names),
    "exclude_modules": ("names or a pattern", _is_names),
    "modules_to_save": ("names", lambda value: isinstance(value, list) and _is_names(value)),
    "target_parameters": ("names", lambda value: isinstance(value, list) and _is_names(value)),
    "layers_pattern": ("names or a pattern", _is_names),
    "layers_to_transform": ("numbers of layers", lambda value: _is_index(value) or _is_indices(value)),
    "trainable_token_indices": (
        "token ids",
        lambda value: _is_indices(value) or _by_name(_is_indices)(value),
    ),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "fan_in_fan_out": ("true or false", _is_flag),
    "inference_mode": ("true or false", _is_flag),
    "lora_dropout": ("a number", _is_alpha),
}
"""Keys that decide what the adapter is: what each takes; null leaves it out."""


def lora_config(values: Mapping[str, Any], what: str) -> LoraConfig:
    """peft's config out of such a file's values. Raises ModelError, opening with `what`."""
    for name, (takes, accepts) in KINDS.items():
        if values.get(name) is not None and not accepts(values[name]):
            raise ModelError(f"{what} cannot be used: {name} is {values[name]!r:.80}; it takes {takes}")
    if values.get("r") is None:
        raise ModelError(f"{what} cannot be used: its config has no r")
    for pattern in _patterns(values):
        _check_pattern(pattern, what)
    known = {field.name for field in dataclasses.fields(LoraConfig)} - IGNORED
    taken = {name: value for name, value in values.items() if name in known and value is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**taken)
    except Exception as error:  # whatever peft's own checks raise over odd values
        raise ModelError(f"{what} cannot be used: {type(error).__name__}: {error}") from error


def check_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ModelError for tensors that are no numbers to train from, or smaller than the config's ranks.

    A rank that no tensor has would take memory, or all of it, before the tensors turn out not to fit.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{what} cannot be used: {name} holds {tensor.dtype}, no real numbers")
        if not tensor.is_meta and not tensor.float().isfinite().all():
            raise ModelError(f"{what} cannot be used: {name} holds values that are not finite")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
    if rank > largest:
        raise ModelError(f"{what} cannot be used: its config has rank {rank}, which none of its tensors has")


def _patterns(values: Mapping[str, Any]) -> Iterator[str]:
    """Everything in it that peft takes for a regular expression."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        found = values.get(name) or ()
        yield from (found,) if isinstance(found, str) else found
    for name in ("rank_pattern", "alpha_pattern"):
        yield from values.get(name) or ()


def _check_pattern(pattern: str, what: str) -> None:
    """Raise ModelError for an expression that could take for ever: repetitions in repetitions, or many."""
    reason = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            repeats = _repeats(_parser.parse(pattern)) if len(pattern) <= 4096 else 99
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"which is no regular expression ({error})"
    else:
        if repeats > 8:
            reason = "a regular expression that could take for ever"
    if reason:
        raise ModelError(f"{what} cannot be used: it names modules by {pattern!r:.80}, {reason}")


def _repeats(parsed: Any, inside: bool = False) -> int:
    """How many open repetitions an expression has; 99 where a repeated part holds a choice or repetition."""
    count = 0
    for operation, argument in parsed:
        name = str(operation)
        if inside and name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT", "BRANCH"):
            return 99
        repeats = name.endswith("_REPEAT") and int(argument[1]) > 1
        count += int(repeats and int(argument[1]) > 64)
        for part in _inner(argument):
            count += _repeats(part, inside or repeats)
    return count


def _inner(argument: Any) -> Iterator[Any]:
    """The expressions inside one operation's argument."""
    if type(argument).__name__ == "SubPattern":
        yield argument
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _inner(part)
