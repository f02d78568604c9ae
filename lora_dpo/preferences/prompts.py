"""One row to a prompt alone: of a preference, a demonstration, or a row that has nothing else."""

from __future__ import annotations

from collections.abc import Callable

from lora_dpo.preferences.conversations import messages, split_at_first_response, with_system
from lora_dpo.preferences.layouts import (
    alpaca_prompt,
    has_pair,
    prompt_and_responses,
    question_of,
    read_pair,
    shown_columns,
)
from lora_dpo.preferences.records import Messages, Prompt, RefusalError, Row, Where
from lora_dpo.preferences.validate import check_prompt, check_text, template_kwargs_of, tools_of

UNDERSTOOD = (
    "prompt; instruction, [input]; question or input; messages or conversations; and every preference layout"
)


def chat_prompt(row: Row, where: Where) -> list[Prompt]:
    prompt = _messages(row)
    check_prompt(prompt)
    return [Prompt(prompt, where, tools_of(row), template_kwargs_of(row))]


def text_prompt(row: Row, where: Where) -> list[Prompt]:
    """prompt: a string, verbatim."""
    if "prompt" not in row:
        raise RefusalError("missing prompt", f"the columns are {shown_columns(row)}")
    text = check_text(row["prompt"], "prompt")
    if not text:
        raise RefusalError("empty prompt")
    return [Prompt(text, where)]


def _messages(row: Row) -> Messages:
    """The row's prompt, not yet validated. A pair's own sides may say more of it than the column does."""
    if has_pair(row):
        return read_pair(row).prompt
    if "prompt" in row:
        return prompt_and_responses(row["prompt"], row)[0]
    if "instruction" in row:
        return alpaca_prompt(row)
    if "question" in row or "input" in row:
        return prompt_and_responses(question_of(row), row)[0]
    for column in ("messages", "conversations"):
        if column in row:
            return with_system(row, _before_the_response(messages(row[column], "user")))
    raise RefusalError("unknown columns", f"{shown_columns(row)}. Understood are: {UNDERSTOOD}")


def _before_the_response(turns: Messages) -> Messages:
    """Whole where the user speaks last; else up to the first answer, as for SFT."""
    return split_at_first_response(turns)[0] if turns and turns[-1]["role"] == "assistant" else turns


PROMPTS: dict[str, Callable[[Row, Where], list[Prompt]]] = {"auto": chat_prompt, "text": text_prompt}
