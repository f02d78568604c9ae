"""The layouts of public preference sets, recognised row by row from the columns.

`PREFERENCE_LAYOUTS` is the order in which they are tried; the first whose columns are there reads the row.
Columns that a layout does not name are ignored, except "tools", "chat_template_kwargs" and "system".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_dpo.preferences.conversations import (
    is_transcript,
    messages,
    shown,
    split_pair,
    split_transcript_prompt,
    split_transcripts,
    with_system,
)
from lora_dpo.preferences.ranked import CANDIDATE_LAYOUTS, best_and_worst, is_labelled, is_ranked
from lora_dpo.preferences.records import Messages, RefusalError, Row


@dataclass(frozen=True)
class Sides:
    """A row's prompt and two responses, not yet validated."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class Layout:
    """name, columns: for the user. fits: whether these are the row's columns. read: the row's sides."""

    name: str
    columns: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], Sides]


def has_pair(row: Row) -> bool:
    return "chosen" in row and "rejected" in row


def prompt_and_responses(prompt: object, row: Row, *responses: object) -> tuple[Messages, list[Messages]]:
    """A prompt (text, messages, or an HH transcript) and responses to it."""
    strip_space = False
    if isinstance(prompt, str) and is_transcript(prompt):
        turns, strip_space = split_transcript_prompt(prompt)
    else:
        turns = messages(prompt, "user")
    sides = [
        messages(side.removeprefix(" ") if strip_space and isinstance(side, str) else side, "assistant")
        for side in responses
    ]
    return with_system(row, turns), sides


def read_explicit(row: Row) -> Sides:
    """prompt, chosen, rejected: text or messages. Sides that repeat the prompt (UltraFeedback) lose it."""
    if is_transcript(row["chosen"]) and is_transcript(row["rejected"]):
        return _without_repeated_prompt(row, read_transcripts(row))
    prompt, (chosen, rejected) = prompt_and_responses(row["prompt"], row, row["chosen"], row["rejected"])
    if not isinstance(row["chosen"], str) and chosen and chosen[0]["role"] != "assistant":
        return _without_repeated_prompt(row, read_implicit(row))
    return Sides(prompt, chosen, rejected)


def _without_repeated_prompt(row: Row, sides: Sides) -> Sides:
    """The sides, if the prompt column is part of the conversations' shared beginning."""
    column, _ = prompt_and_responses(row["prompt"], {})
    plain = [_plain(message) for message in sides.prompt]
    wanted = [_plain(message) for message in column]
    if any(plain[start : start + len(wanted)] == wanted for start in range(len(plain) - len(wanted) + 1)):
        return sides
    raise RefusalError(
        "prompts differ", f"chosen and rejected do not both begin with the prompt {shown(row['prompt'])}"
    )


def _plain(message: dict) -> tuple[object, object]:
    return message["role"], message.get("content")


def read_sharegpt(row: Row) -> Sides:
    """conversations is the prompt; chosen and rejected are messages, lists of them, or text."""
    prompt = with_system(row, messages(row["conversations"], "user"))
    return Sides(prompt, messages(row["chosen"], "assistant"), messages(row["rejected"], "assistant"))


def alpaca_prompt(row: Row) -> Messages:
    r"""instruction and, where it is not empty, input: joined by "\n".

    history: the earlier turns, a list of [user, assistant] pairs.
    """
    instruction, extra = row["instruction"], row.get("input", "")
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise RefusalError("content is not text", f"instruction or input is {shown([instruction, extra])}")
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in earlier
    ):
        raise RefusalError("malformed history", f"expected a list of [user, assistant], got {shown(earlier)}")
    turns = [
        {"role": role, "content": text}
        for turn in earlier
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    content = f"{instruction}\n{extra}" if extra else instruction
    return with_system(row, (*turns, {"role": "user", "content": content}))


def read_alpaca(row: Row) -> Sides:
    prompt = alpaca_prompt(row)
    return Sides(prompt, messages(row["chosen"], "assistant"), messages(row["rejected"], "assistant"))


def question_of(row: Row) -> object:
    return row["question"] if "question" in row else row["input"]


def read_orca(row: Row) -> Sides:
    """question (or input), under system."""
    prompt, (chosen, rejected) = prompt_and_responses(question_of(row), row, row["chosen"], row["rejected"])
    return Sides(prompt, chosen, rejected)


def read_transcripts(row: Row) -> Sides:
    r"""Two "\n\nHuman: … \n\nAssistant: …" transcripts that differ in their last turn."""
    prompt, chosen, rejected = split_transcripts(row["chosen"], row["rejected"])
    return Sides(with_system(row, prompt), chosen, rejected)


def read_implicit(row: Row) -> Sides:
    """Two whole conversations; their prompt is what they share."""
    chosen, rejected = messages(row["chosen"], "assistant"), messages(row["rejected"], "assistant")
    prompt, *responses = split_pair(chosen, rejected)
    return Sides(with_system(row, prompt), *responses)


def read_candidates(row: Row) -> Sides:
    """The best and the worst of a row's responses."""
    if "instruction" in row and "prompt" not in row:
        prompt: object = alpaca_prompt(row)
    else:
        prompt = row["prompt"] if "prompt" in row else question_of(row)
    prompt, (best, worst) = prompt_and_responses(prompt, row, *best_and_worst(row))
    return Sides(prompt, best, worst)


def _are_conversations(row: Row) -> bool:
    return has_pair(row) and not isinstance(row["chosen"], str)


def _are_transcripts(row: Row) -> bool:
    return has_pair(row) and (is_transcript(row["chosen"]) or is_transcript(row["rejected"]))


def _pair_with(*columns: str) -> Callable[[Row], bool]:
    return lambda row: has_pair(row) and any(column in row for column in columns)


def _has_prompt(row: Row) -> bool:
    return any(column in row for column in ("prompt", "instruction", "question", "input"))


PREFERENCE_LAYOUTS = (
    Layout("explicit prompt", "prompt, chosen, rejected", _pair_with("prompt"), read_explicit),
    Layout("ShareGPT", "conversations, chosen, rejected", _pair_with("conversations"), read_sharegpt),
    Layout(
        "Alpaca", "instruction, [input], [history], chosen, rejected", _pair_with("instruction"), read_alpaca
    ),
    Layout(
        "Orca", "[system], question or input, chosen, rejected", _pair_with("question", "input"), read_orca
    ),
    Layout("Anthropic HH", "chosen, rejected as transcripts", _are_transcripts, read_transcripts),
    Layout("implicit prompt", "chosen, rejected as lists of messages", _are_conversations, read_implicit),
    Layout(
        "ranked responses",
        CANDIDATE_LAYOUTS["ranked"],
        lambda row: _has_prompt(row) and is_ranked(row),
        read_candidates,
    ),
    Layout(
        "labelled pair",
        CANDIDATE_LAYOUTS["labelled"],
        lambda row: _has_prompt(row) and is_labelled(row),
        read_candidates,
    ),
)


def read_pair(row: Row) -> Sides:
    """The sides of a row by the first layout that fits."""
    for layout in PREFERENCE_LAYOUTS:
        if layout.fits(row):
            return layout.read(row)
    for side in ("chosen", "rejected"):
        if side not in row and {"chosen", "rejected"} & row.keys():
            raise RefusalError(f"missing {side}", f"the columns are {shown_columns(row)}")
    if has_pair(row):
        detail = "chosen and rejected are text, but no transcripts; rendered text needs data.format=text"
        raise RefusalError("missing prompt", detail)
    raise unknown_columns(row, PREFERENCE_LAYOUTS)


def shown_columns(row: Row) -> str:
    return ", ".join(map(shown, row)) or "none"


def unknown_columns(row: Row, layouts: tuple[Layout, ...]) -> RefusalError:
    understood = "; ".join(f"{layout.name} ({layout.columns})" for layout in layouts)
    return RefusalError("unknown columns", f"{shown_columns(row)}. Understood are: {understood}")
