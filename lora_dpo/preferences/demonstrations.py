"""The layouts of demonstrations (SFT): their own, and every preference layout with chosen as the response."""

from __future__ import annotations

from lora_dpo.preferences.conversations import messages, split_at_first_response, with_system
from lora_dpo.preferences.layouts import (
    PREFERENCE_LAYOUTS,
    Layout,
    Sides,
    alpaca_prompt,
    prompt_and_responses,
    question_of,
    read_pair,
    unknown_columns,
)
from lora_dpo.preferences.records import Row

ANSWERS = ("completion", "response", "output", "answer")


def _answer(row: Row) -> object:
    return next((row[column] for column in ANSWERS if column in row), None)


def _has_answer(row: Row) -> bool:
    return _answer(row) is not None


def _one_sided(prompt: object, row: Row) -> Sides:
    turns, (response,) = prompt_and_responses(prompt, row, _answer(row))
    return Sides(turns, response, ())


def _read_conversation(row: Row, column: str) -> Sides:
    """The response begins with the first assistant turn, so that all of them are scored."""
    prompt, response = split_at_first_response(messages(row[column], "user"))
    return Sides(with_system(row, prompt), response, ())


def _read_alpaca(row: Row) -> Sides:
    return Sides(alpaca_prompt(row), messages(_answer(row), "assistant"), ())


DEMONSTRATION_LAYOUTS = (
    Layout(
        "messages", "messages", lambda row: "messages" in row, lambda row: _read_conversation(row, "messages")
    ),
    Layout(
        "ShareGPT",
        "conversations",
        lambda row: "conversations" in row,
        lambda row: _read_conversation(row, "conversations"),
    ),
    Layout(
        "prompt and completion",
        "prompt, completion or response",
        lambda row: "prompt" in row and _has_answer(row),
        lambda row: _one_sided(row["prompt"], row),
    ),
    Layout(
        "Alpaca",
        "instruction, [input], output",
        lambda row: "instruction" in row and _has_answer(row),
        _read_alpaca,
    ),
    Layout(
        "question and answer",
        "[system], question or input, answer or response",
        lambda row: ("question" in row or "input" in row) and _has_answer(row),
        lambda row: _one_sided(question_of(row), row),
    ),
)


def read_response(row: Row) -> Sides:
    """The prompt and, as chosen, the response of a row by the first layout that fits."""
    if "chosen" in row:
        return read_pair({"rejected": row["chosen"], **row})
    for layout in DEMONSTRATION_LAYOUTS:
        if layout.fits(row):
            return layout.read(row)
    for layout in PREFERENCE_LAYOUTS:
        if layout.fits(row):
            return layout.read(row)
    raise unknown_columns(row, DEMONSTRATION_LAYOUTS + PREFERENCE_LAYOUTS)
