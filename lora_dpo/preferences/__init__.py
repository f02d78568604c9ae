"""Public preference-data formats, read into one record that knows its file and row.

The way of a row: `sources` finds files, `json_rows` and `tables` read them row by row, `layouts` (for SFT
`demonstrations`, for KTO `ratings`) recognises each from its own columns, `validate` checks the conversation,
`building` makes the record, `mixture` weights, caps and splits, `mismatched` pairs ratings with the responses
of others. `loading` puts them together.
"""

from lora_dpo.preferences.loading import (
    Loaded,
    describe_ratings,
    describe_skipped,
    load_demonstrations,
    load_preferences,
    load_prompts,
    load_ratings,
)
from lora_dpo.preferences.records import (
    AnyRecord,
    BadRowError,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Rating,
    Where,
)

__all__ = [
    "AnyRecord",
    "BadRowError",
    "Demonstration",
    "Loaded",
    "Message",
    "Preference",
    "Prompt",
    "Rating",
    "Where",
    "describe_ratings",
    "describe_skipped",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "load_ratings",
]
