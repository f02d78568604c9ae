"""Messages out of the ways public sets write them, and a prompt out of two whole conversations."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from lora_dpo.preferences.json_rows import MalformedError, parse
from lora_dpo.preferences.records import Message, Messages, RefusalError, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_marker = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80


def shown(value: object) -> str:
    """A short repr for messages to the user."""
    try:
        return _shorten.repr(value)
    except Exception:  # an integer of thousands of digits, or an object of the user's that has no good repr
        return f"a value of type {type(value).__name__}"


def is_empty(value: object) -> bool:
    """Whether this is the empty text; comparing an array with a text would give an array."""
    return isinstance(value, str) and not value


def messages(value: object, role: str) -> Messages:
    """A string becomes one message of `role`; a message, or a list of messages, is taken as it is.

    Messages are {"role", "content"} or ShareGPT's {"from", "value"}; their None-valued keys are dropped.
    """
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, dict):
        return (_message(value),)
    if isinstance(value, (list, tuple)):
        return tuple(_message(item) for item in value)
    raise RefusalError("content is not text", f"neither text nor messages but {shown(value)}")


def _message(value: object) -> Message:
    if not isinstance(value, dict):
        raise RefusalError("not a message", f"expected an object with role and content, got {shown(value)}")
    present = {str(key): item for key, item in value.items() if item is not None}
    if "role" not in present and "from" in present:
        return _sharegpt_message(present)
    role = present.get("role")
    if role not in ROLES:
        raise RefusalError("unknown role", f"{shown(role)}; the roles are {', '.join(ROLES)}")
    if "content" not in present and present.get("tool_calls"):
        present["content"] = ""  # templates may print an absent content as "None"
    return present


def _sharegpt_message(value: Message) -> Message:
    speaker, content = value.pop("from"), value.pop("value", None)
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(content), **value}
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join([*SHAREGPT_ROLES, "function_call"])
        raise RefusalError("unknown role", f"{shown(speaker)}; the speakers are {known}")
    return {"role": role, "content": content, **value}


def _tool_calls(text: object) -> list[dict[str, Any]]:
    """The tool calls of a function_call turn: JSON of {"name", "arguments"}, or a list of them."""
    try:
        calls = parse(text) if isinstance(text, str) else text
    except MalformedError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RefusalError("malformed tool call", f"expected JSON of name and arguments, got {shown(text)}")
    return [{"type": "function", "function": call} for call in calls]


def with_system(row: Row, conversation: Messages) -> Messages:
    """The conversation under the row's "system" (or "system_prompt") column; an empty one adds nothing."""
    system = row.get("system", row.get("system_prompt"))
    if system is None or is_empty(system):
        return conversation
    message = {"role": "system", "content": system}
    return conversation if conversation[:1] == (message,) else (message, *conversation)


def split_at_first_response(conversation: Messages) -> tuple[Messages, Messages]:
    """The messages before the first assistant turn, and the rest."""
    for index, message in enumerate(conversation):
        if message["role"] == "assistant":
            return conversation[:index], conversation[index:]
    return conversation, ()


def split_at_last_response(conversation: Messages) -> tuple[Messages, Messages]:
    """The messages up to the last user's, and what follows it."""
    users = [index for index, message in enumerate(conversation) if message["role"] == "user"]
    start = users[-1] + 1 if users else 0
    return conversation[:start], conversation[start:]


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of two whole conversations.

    The prompt is their longest common prefix that leaves an assistant message at the front of both rests. The
    first difference must lie in an assistant's message.
    """
    shared = 0
    shortest = min(len(chosen), len(rejected))
    while shared < shortest and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == shortest:  # one continues the other, or they are equal: step back to a response
        while shared > 0 and (shared >= shortest or chosen[shared]["role"] != "assistant"):
            shared -= 1
    roles = [side[shared]["role"] if side else None for side in (chosen, rejected)]
    if roles != ["assistant", "assistant"]:
        raise RefusalError(
            "prompts differ", f"message {shared + 1} differs or ends a side, and is not the assistant's"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def is_transcript(text: object) -> bool:
    """Whether this is an Anthropic-HH transcript."""
    if not isinstance(text, str):
        return False
    return text.startswith("\n\nHuman:") or (text.startswith("Human:") and "\n\nAssistant:" in text)


def transcript(text: str) -> Messages:
    r"""The turns of "\n\nHuman: …\n\nAssistant: …".

    One space after the colon belongs to the marker; nothing else is stripped.
    """
    _, *pieces = _marker.split(text)
    speakers, contents = pieces[0::2], pieces[1::2]
    return tuple(
        {"role": "user" if speaker == "Human" else "assistant", "content": content.removeprefix(" ")}
        for speaker, content in zip(speakers, contents, strict=True)
    )


def split_transcripts(chosen: object, rejected: object) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of two transcripts that differ in their last turn only."""
    sides: list[Messages] = []
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str) or not is_transcript(text):
            raise RefusalError("not a transcript", rf"{side} does not begin with '\n\nHuman:': {shown(text)}")
        sides.append(transcript(text))
    first, second = sides
    if first[:-1] != second[:-1]:
        raise RefusalError("prompts differ", "the transcripts differ before their last turn")
    return first[:-1], first[-1:], second[-1:]


def split_transcript_prompt(prompt: str) -> tuple[Messages, bool]:
    r"""The turns of a prompt that may end in an open "\n\nAssistant:".

    The flag says whether the space that belongs to that marker is still at the front of the responses.
    """
    turns = transcript(prompt)
    is_open = turns[-1] == {"role": "assistant", "content": ""}
    return (turns[:-1] if is_open else turns), is_open and prompt.endswith(":")
