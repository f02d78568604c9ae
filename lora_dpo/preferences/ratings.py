"""The layouts of ratings (KTO): one response with a label, or a pair, whose sides are one of each.

A label rates the last response: of a whole conversation everything up to the last user's message is prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lora_dpo.preferences.conversations import shown, split_at_last_response
from lora_dpo.preferences.demonstrations import ONE_RESPONSE_LAYOUTS, conversation_layouts
from lora_dpo.preferences.layouts import (
    PREFERENCE_LAYOUTS,
    has_pair,
    read_pair,
    shown_columns,
    unknown_columns,
)
from lora_dpo.preferences.records import Messages, RefusalError, Row

LABEL = "label"
DESIRABLE = ("true", "1", "thumbs up", "up", "desirable", "good", "\N{THUMBS UP SIGN}")
UNDESIRABLE = ("false", "0", "thumbs down", "down", "undesirable", "bad", "\N{THUMBS DOWN SIGN}")
_separators = re.compile(r"[-_]")


@dataclass(frozen=True)
class Rated:
    """A prompt, a response, and whether it is a desirable one; not yet validated."""

    prompt: Messages
    response: Messages
    desirable: bool


RATING_LAYOUTS = tuple(
    replace(layout, columns=f"{layout.columns}, {LABEL}")
    for layout in (*conversation_layouts(split_at_last_response), *ONE_RESPONSE_LAYOUTS)
)


def read_ratings(row: Row) -> list[Rated]:
    """What a row rates: its response, or both sides of a pair (a label beside a pair says nothing)."""
    layout = next((layout for layout in RATING_LAYOUTS if layout.fits(row)), None)
    if layout is not None and LABEL in row and not has_pair(row):
        sides = layout.read(row)
        return [Rated(sides.prompt, sides.chosen, label_of(row))]
    if {"chosen", "rejected"} & row.keys() or any(layout.fits(row) for layout in PREFERENCE_LAYOUTS):
        sides = read_pair(row)
        return [Rated(sides.prompt, sides.chosen, True), Rated(sides.prompt, sides.rejected, False)]
    if layout is not None:
        raise missing_label(row)
    raise unknown_columns(row, RATING_LAYOUTS + PREFERENCE_LAYOUTS)


def missing_label(row: Row) -> RefusalError:
    return RefusalError("missing label", f"a response needs one; the columns are {shown_columns(row)}")


def label_of(row: Row) -> bool:
    """The "label" column: true or false, 1 or 0, or the words for them."""
    label = row[LABEL]
    if isinstance(label, (int, float)) and label in (0, 1):
        return bool(label)
    word = " ".join(_separators.sub(" ", label).lower().split()) if isinstance(label, str) else ""
    if word not in DESIRABLE + UNDESIRABLE:
        takes = "it takes true or false, 1 or 0, thumbs up or thumbs down"
        raise RefusalError("unknown label", f"{shown(label)}; {takes}")
    return word in DESIRABLE
