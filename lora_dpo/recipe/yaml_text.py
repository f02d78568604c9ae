"""YAML that may be somebody else's: plain values only, and no more of them than a recipe can need."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 2**22
"""Characters of a file; a chat template may be in it."""
MOST = 100_000
"""Values, with every alias counted as often as it is used: nine lines can stand for a billion."""


def parse_yaml(text: str) -> Any:
    """The values of YAML text. Raises yaml.YAMLError for other text, endless values and Python objects."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters; {LARGEST:,} are taken")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}) > MOST:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST:,} values")
        return yaml.safe_load(text)
    except (ValueError, OverflowError) as error:  # a date that is none, an int of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; one inside itself stands for too many."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # for as long as it is being counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = min(MOST + 1, 1 + sum(_size(part, known) for part in nodes))
    return known[id(node)]
