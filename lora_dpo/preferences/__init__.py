"""Public preference-data formats, read into one record that knows its file and row.

The way of a row: `sources` finds files, `json_rows` and `tables` read them row by row, `layouts` (for SFT
`demonstrations`) recognises each from its own columns, `validate` checks the conversation, `building` makes
the record, `mixture` weights, caps and splits. `loading` puts them together.
"""

from lora_dpo.preferences.loading import (
    Loaded,
    describe_skipped,
    load_demonstrations,
    load_preferences,
)
from lora_dpo.preferences.records import BadRowError, Demonstration, Message, Preference, Where

__all__ = [
    "BadRowError",
    "Demonstration",
    "Loaded",
    "Message",
    "Preference",
    "Where",
    "describe_skipped",
    "load_demonstrations",
    "load_preferences",
]
