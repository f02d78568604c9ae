"""One row to one validated record: a preference or a demonstration, chat or already rendered text."""

from __future__ import annotations

from collections.abc import Callable

from lora_dpo.preferences.demonstrations import ANSWERS, read_response
from lora_dpo.preferences.layouts import read_pair, shown_columns
from lora_dpo.preferences.records import Demonstration, Preference, RefusalError, Row, Where
from lora_dpo.preferences.validate import (
    check_prompt,
    check_response,
    check_text,
    check_text_response,
    template_kwargs_of,
    tools_of,
)


def chat_preference(row: Row, where: Where) -> Preference:
    sides = read_pair(row)
    check_prompt(sides.prompt)
    check_response(sides.prompt, sides.chosen, "chosen")
    check_response(sides.prompt, sides.rejected, "rejected")
    _check_different(sides.chosen, sides.rejected)
    return Preference(
        sides.prompt, sides.chosen, sides.rejected, where, tools_of(row), template_kwargs_of(row)
    )


def chat_demonstration(row: Row, where: Where) -> Demonstration:
    sides = read_response(row)
    check_prompt(sides.prompt)
    check_response(sides.prompt, sides.chosen, "the response")
    return Demonstration(sides.prompt, sides.chosen, where, tools_of(row), template_kwargs_of(row))


def text_preference(row: Row, where: Where) -> Preference:
    """prompt, chosen, rejected: strings, verbatim. Without a prompt, the two sides are whole texts."""
    for side in ("chosen", "rejected"):
        if side not in row:
            raise RefusalError(f"missing {side}", f"the columns are {shown_columns(row)}")
    prompt = check_text(row.get("prompt", ""), "prompt")
    chosen = check_text_response(row["chosen"], "chosen")
    rejected = check_text_response(row["rejected"], "rejected")
    _check_different(chosen, rejected)
    return Preference(prompt, chosen, rejected, where)


def text_demonstration(row: Row, where: Where) -> Demonstration:
    """prompt and completion (response, output, answer, chosen), or text alone: strings, verbatim."""
    columns = (*ANSWERS, "chosen", "text")
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise RefusalError("missing response", f"none of {', '.join(columns)} in {shown_columns(row)}")
    prompt = check_text(row.get("prompt", ""), "prompt")
    return Demonstration(prompt, check_text_response(row[column], column), where)


def _check_different(chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise RefusalError("identical sides", "chosen and rejected are the same")


PREFERENCES: dict[str, Callable[[Row, Where], Preference]] = {
    "auto": chat_preference,
    "text": text_preference,
}
DEMONSTRATIONS: dict[str, Callable[[Row, Where], Demonstration]] = {
    "auto": chat_demonstration,
    "text": text_demonstration,
}
