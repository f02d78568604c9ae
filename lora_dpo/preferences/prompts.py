"""Prompts to answer: rows that hold one alone, and every layout that has one before its responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lora_dpo.preferences.conversations import messages, split_at_last_response, with_system
from lora_dpo.preferences.layouts import (
    Layout,
    alpaca_prompt,
    has_pair,
    prompt_and_responses,
    question_of,
    read_pair,
    unknown_columns,
)
from lora_dpo.preferences.loading import Loaded, load_records
from lora_dpo.preferences.mixture import digest
from lora_dpo.preferences.records import Messages, Prompt, Row, Where
from lora_dpo.preferences.validate import check_prompt, check_text, template_kwargs_of, tools_of
from lora_dpo.recipe import Data

Reader = Callable[[Row], Messages]


def _conversation(column: str) -> Reader:
    """Everything up to the last user's message: what was answered after it is left out."""
    return lambda row: with_system(row, split_at_last_response(messages(row[column], "user"))[0])


PROMPT_READERS: dict[str, Reader] = {
    "prompt": lambda row: prompt_and_responses(row["prompt"], row)[0],
    "instruction": alpaca_prompt,
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "question": lambda row: prompt_and_responses(question_of(row), row)[0],
    "input": lambda row: prompt_and_responses(question_of(row), row)[0],
}
"""By the column that holds the prompt; the first that a row has reads it."""

_PROMPT = Layout(
    "prompt",
    "prompt, instruction, messages, conversations, question or input; or any pair",
    lambda row: True,
    read_pair,
)


def read_prompt(row: Row) -> Messages:
    """A row's prompt, whatever answers it has; of a pair, what both sides answer."""
    if has_pair(row):
        return read_pair(row).prompt
    for column, read in PROMPT_READERS.items():
        if column in row:
            return read(row)
    raise unknown_columns(row, (_PROMPT,))


def chat_prompt(row: Row, where: Where) -> list[Prompt]:
    prompt = read_prompt(row)
    check_prompt(prompt)
    return [Prompt(prompt, where, tools_of(row), template_kwargs_of(row))]


def text_prompt(row: Row, where: Where) -> list[Prompt]:
    """prompt: a string, verbatim."""
    return [Prompt(check_text(row.get("prompt"), "prompt"), where)]


PROMPTS = {"auto": chat_prompt, "text": text_prompt}


def load_prompts(data: Data, *, seed: int = 0, base_dir: Path | None = None) -> Loaded[Prompt]:
    """As `load_preferences`, of each row the prompt alone; every prompt once, where it came first."""
    loaded = load_records(data, PROMPTS[data.format], seed, base_dir)
    return replace(loaded, train=_distinct(loaded.train), eval=_distinct(loaded.eval))


def _distinct(prompts: list[Prompt]) -> list[Prompt]:
    found: dict[bytes, Prompt] = {}
    for item in prompts:
        found.setdefault(digest([item.prompt, item.tools, item.template_kwargs]), item)
    return list(found.values())
