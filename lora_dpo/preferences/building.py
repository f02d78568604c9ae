"""One row to validated records: a preference, a demonstration, or ratings; chat or already rendered text."""

from __future__ import annotations

from collections.abc import Callable

from lora_dpo.preferences.demonstrations import ANSWERS, read_response
from lora_dpo.preferences.layouts import has_pair, read_pair, shown_columns
from lora_dpo.preferences.ratings import LABEL, label_of, missing_label, read_ratings
from lora_dpo.preferences.records import Demonstration, Preference, Rating, RefusalError, Row, Where
from lora_dpo.preferences.validate import (
    check_prompt,
    check_response,
    check_text,
    check_text_response,
    template_kwargs_of,
    tools_of,
    values_of,
)


def chat_preference(row: Row, where: Where) -> list[Preference]:
    sides = read_pair(row)
    check_prompt(sides.prompt)
    check_response(sides.prompt, sides.chosen, "chosen")
    check_response(sides.prompt, sides.rejected, "rejected")
    _check_different(sides.chosen, sides.rejected)
    texts = (sides.prompt, sides.chosen, sides.rejected)
    return [Preference(*texts, where, tools_of(row), template_kwargs_of(row), _pair_values(row))]


def chat_demonstration(row: Row, where: Where) -> list[Demonstration]:
    sides = read_response(row)
    check_prompt(sides.prompt)
    check_response(sides.prompt, sides.chosen, "the response")
    return [Demonstration(sides.prompt, sides.chosen, where, tools_of(row), template_kwargs_of(row))]


def chat_ratings(row: Row, where: Where) -> list[Rating]:
    """One of a response with a label, two of a pair."""
    found = read_ratings(row)
    names = ("the response",) if len(found) == 1 else ("chosen", "rejected")
    for rated, name in zip(found, names, strict=True):
        check_prompt(rated.prompt)
        check_response(rated.prompt, rated.response, name)
    if len(found) == 2:
        _check_different(found[0].response, found[1].response)
    rest = (where, tools_of(row), template_kwargs_of(row), values_of(row, "weight"))
    return [Rating(rated.prompt, rated.response, rated.desirable, *rest) for rated in found]


def text_preference(row: Row, where: Where) -> list[Preference]:
    """prompt, chosen, rejected: strings, verbatim. Without a prompt, the two sides are whole texts."""
    return [Preference(*_text_pair(row), where, values=_pair_values(row))]


def _text_pair(row: Row) -> tuple[str, str, str]:
    for side in ("chosen", "rejected"):
        if side not in row:
            raise RefusalError(f"missing {side}", f"the columns are {shown_columns(row)}")
    prompt = check_text(row.get("prompt", ""), "prompt")
    chosen = check_text_response(row["chosen"], "chosen")
    rejected = check_text_response(row["rejected"], "rejected")
    _check_different(chosen, rejected)
    return prompt, chosen, rejected


def text_demonstration(row: Row, where: Where) -> list[Demonstration]:
    """prompt and completion (response, output, answer, chosen), or text alone: strings, verbatim."""
    return [Demonstration(*_text_response(row, *ANSWERS, "chosen", "text"), where)]


def text_ratings(row: Row, where: Where) -> list[Rating]:
    """As demonstrations (without chosen) with a label, or a pair: strings, verbatim."""
    values = values_of(row, "weight")
    if has_pair(row):
        prompt, chosen, rejected = _text_pair(row)
        sides = ((chosen, True), (rejected, False))
        return [Rating(prompt, response, good, where, values=values) for response, good in sides]
    prompt, response = _text_response(row, *ANSWERS, "text")
    if LABEL not in row:
        raise missing_label(row)
    return [Rating(prompt, response, label_of(row), where, values=values)]


def _text_response(row: Row, *columns: str) -> tuple[str, str]:
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise RefusalError("missing response", f"none of {', '.join(columns)} in {shown_columns(row)}")
    prompt = check_text(row.get("prompt", ""), "prompt")
    return prompt, check_text_response(row[column], column)


def _pair_values(row: Row) -> dict[str, float]:
    return values_of(row, "weight", "margin")


def _check_different(chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise RefusalError("identical sides", "chosen and rejected are the same")


PREFERENCES: dict[str, Callable[[Row, Where], list[Preference]]] = {
    "auto": chat_preference,
    "text": text_preference,
}
DEMONSTRATIONS: dict[str, Callable[[Row, Where], list[Demonstration]]] = {
    "auto": chat_demonstration,
    "text": text_demonstration,
}
RATINGS: dict[str, Callable[[Row, Where], list[Rating]]] = {
    "auto": chat_ratings,
    "text": text_ratings,
}
