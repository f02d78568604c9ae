"""What options of the adapter take that no plain type says: initialisations, layers, tokens, values by
module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from lora_dpo.errors import RecipeError
from lora_dpo.recipe.coerce import coerce, nearest, refusal

INITS = ("default", "gaussian", "eva", "pissa", "olora")

_REWRITES = "it rewrites the base, and adapters off would no longer give it back"
REFUSED_INITS = {
    "corda": f"{_REWRITES}; pissa keeps the base",
    "loftq": f"{_REWRITES}; pissa keeps the base",
    "orthogonal": f"{_REWRITES}; olora starts from orthogonal factors and keeps the base",
    "rslora": "it is a scaling, not an initialisation: set adapter.rslora=true",
    "dora": "it is a kind of adapter, not an initialisation: set adapter.dora=true",
}
"""Initialisations of PEFT that are not offered: why not, and what to take instead."""

LAYERS = re.compile(r"(-?\d+|(-?\d+)?:(-?\d+)?)(,(-?\d+|(-?\d+)?:(-?\d+)?))*")
"""Numbers of layers and half-open ranges of them, as Python's slices write them."""


def parse_init(value: Any, key: str) -> str:
    name = str(value).lower()
    reason = REFUSED_INITS.get(re.sub("^rank.?stabili[sz]ed$", "rslora", name))
    if reason:
        raise RecipeError(f"{key} got {value!r}: {reason}")
    if name not in INITS:
        raise refusal(key, value, f"one of {', '.join(INITS)}{nearest(name, INITS)}")
    return name


def parse_layers(value: Any, key: str) -> str | None:
    """Layers as text without spaces: "0:8", "-4:", "0,1,30:". A list holds such parts."""
    if value is None or value in ("", "null", "none", "None"):
        return None
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    text = value.replace(" ", "").removeprefix("[").removesuffix("]") if isinstance(value, str) else ""
    if not LAYERS.fullmatch(text):
        # YAML reads an unquoted 4:8 as a number in base 60.
        raise refusal(key, value, 'layers such as "0:8" (the first eight), "-4:" or "0,1,5", in quotes')
    return text


def parse_token(value: Any, key: str) -> int | str:
    """A token's id, or its text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise refusal(key, value, "a token's text or its id")
    if isinstance(value, int) and value < 0:
        raise refusal(key, value, "a token's text or its id, at least 0")
    return value


def by_module(hint: Any) -> Callable[[Any, str], dict[str, Any]]:
    """A parser for a mapping from module names to values of a type."""

    def parse(value: Any, key: str) -> dict[str, Any]:
        given = _yaml(value, key) if isinstance(value, str) else value
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise refusal(key, value, "a mapping from module names, such as {q_proj: 8}")
        for name in given:
            _check_pattern(name, key)
        return {name: coerce(hint, item, f"{key}.{name}") for name, item in given.items()}

    return parse


def _yaml(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {text!r} is not a YAML mapping: {error}") from None


def _check_pattern(name: Any, key: str) -> None:
    """PEFT reads these names as regular expressions."""
    try:
        if isinstance(name, str) and name:
            re.compile(name)
            return
    except re.error as error:
        raise RecipeError(f"{key}: {name!r} is no regular expression: {error}") from None
    raise refusal(key, name, "module names, such as q_proj")
