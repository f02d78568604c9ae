"""The layouts of demonstrations (SFT): their own, and every preference layout with chosen as the response."""

from __future__ import annotations

from collections.abc import Callable

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
from lora_dpo.preferences.records import Messages, Row

ANSWERS = ("completion", "response", "output", "answer")


def _answer(row: Row) -> object:
    return next((row[column] for column in ANSWERS if column in row), None)


def _has_answer(row: Row) -> bool:
    return _answer(row) is not None


def _one_sided(prompt: object, row: Row) -> Sides:
    turns, (response,) = prompt_and_responses(prompt, row, _answer(row))
    return Sides(turns, response, ())


def _read_alpaca(row: Row) -> Sides:
    return Sides(alpaca_prompt(row), messages(_answer(row), "assistant"), ())


def conversation_layouts(split: Callable[[Messages], tuple[Messages, Messages]]) -> tuple[Layout, Layout]:
    """Whole conversations; `split` says where the response begins."""

    def layout(name: str, column: str) -> Layout:
        def read(row: Row) -> Sides:
            prompt, response = split(messages(row[column], "user"))
            return Sides(with_system(row, prompt), response, ())

        return Layout(name, column, lambda row: column in row, read)

    return layout("messages", "messages"), layout("ShareGPT", "conversations")


ONE_RESPONSE_LAYOUTS = (
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
DEMONSTRATION_LAYOUTS = (*conversation_layouts(split_at_first_response), *ONE_RESPONSE_LAYOUTS)
"""The response begins with the first assistant turn, so that all of them are scored."""


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
