"""What a conversation must be to be trained on. Nothing is repaired: a row passes as it is or is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_dpo.preferences.conversations import is_empty, shown
from lora_dpo.preferences.json_rows import MalformedError, parse
from lora_dpo.preferences.records import Message, Messages, RefusalError, Row

DEEPEST = 64
_may_follow = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_prompt(prompt: Messages) -> None:
    """Role order and text of the prompt, which ends with a user or tool message."""
    _check_turns(prompt, None, "prompt")
    last = prompt[-1]["role"] if prompt else None
    if last not in ("user", "tool"):
        raise RefusalError(
            "roles out of order", f"the prompt must end with user or tool, not with {last or 'nothing'}"
        )
    if last == "user" and not prompt[-1]["content"].strip():
        raise RefusalError("empty prompt", "the prompt's last message has no text")


def check_response(prompt: Messages, response: Messages, side: str) -> None:
    """Role order and text of a response, which begins and ends with an assistant message.

    An assistant message without text needs tool calls.
    """
    last = response[-1]["role"] if response else None
    if last != "assistant":
        raise RefusalError(
            "roles out of order", f"{side} must end with assistant, not with {last or 'nothing'}"
        )
    _check_turns(response, prompt[-1]["role"], side)
    for message in response:
        if (
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
        ):
            raise RefusalError("empty response", f"{side} has an assistant message without text")


def check_text(value: object, name: str) -> str:
    """The value, if it is a string that can be encoded."""
    if not isinstance(value, str):
        raise RefusalError("content is not text", f"{name} is {shown(value)}")
    check_unicode(value, name)
    return value


def check_text_response(value: object, name: str) -> str:
    """The value, if it is a string with more than white space."""
    text = check_text(value, name)
    if not text.strip():
        raise RefusalError("empty response", f"{name} has no text")
    return text


def _check_turns(turns: Messages, previous: str | None, side: str) -> None:
    for number, message in enumerate(turns, start=1):
        role = message["role"]
        if role not in _may_follow[previous]:
            after = f"after {previous}" if previous else "at the beginning"
            raise RefusalError("roles out of order", f"{side} message {number} is {role} {after}")
        previous = role
        _check_content(message, f"{side} message {number} ({role})")


def _check_content(message: Message, name: str) -> None:
    check_text(message.get("content"), f"the content of {name}")
    for key, value in message.items():
        if key not in ("role", "content"):
            check_unicode(value, f"{key!r} of {name}")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RefusalError(
            "malformed tool call", f"tool_calls of {name} is {shown(calls)}, not a list of objects"
        )


def check_unicode(value: object, name: str, depth: int = 0) -> None:
    """Every string in the value can be encoded (no lone surrogates), and it is nested at most 64 deep."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RefusalError("invalid Unicode", f"{name} has a lone surrogate at {error.start}") from None
    elif depth == DEEPEST:
        raise RefusalError("nested too deeply", f"{name} is nested more than {DEEPEST} deep")
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_unicode(item, name, depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(key, name, depth + 1)
            check_unicode(item, name, depth + 1)


def tools_of(row: Row) -> tuple[dict[str, Any], ...] | None:
    """The "tools" column: a list of objects, or JSON of one. An empty list is no tools."""
    tools = _parsed(row.get("tools"), "tools")
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise RefusalError("malformed tools", f"expected a list of objects, got {shown(tools)}")
    check_unicode(tools, "tools")
    return tuple(tools) or None


def template_kwargs_of(row: Row) -> Mapping[str, Any]:
    """The "chat_template_kwargs" column: an object, or JSON of one."""
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise RefusalError("malformed chat_template_kwargs", f"expected an object, got {shown(kwargs)}")
    check_unicode(kwargs, "chat_template_kwargs")
    return kwargs


def values_of(row: Row, *columns: str) -> dict[str, float]:
    """Those of the columns "weight" and "margin" that the row has (an empty cell of a CSV file is none)."""
    return {
        column: _number(row[column], column)
        for column in columns
        if column in row and not is_empty(row[column])
    }


def _number(value: object, column: str) -> float:
    try:
        numeric = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        number = float(value) if numeric else math.nan  # pyright: ignore[reportArgumentType]
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RefusalError(f"{column} is not a finite number", f"it is {shown(value)}")
    if column == "weight" and number < 0:
        raise RefusalError("weight is negative", f"it is {shown(value)}; a weight is 0 or more")
    return number


def _parsed(value: object, column: str) -> object:
    if not isinstance(value, str):
        return value
    if not value:
        return None
    try:
        return parse(value)
    except MalformedError as error:
        raise RefusalError(f"malformed {column}", f"{error}: {shown(value)}") from None
