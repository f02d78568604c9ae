"""Rows with several responses: the best and the worst become the pair.

A higher grade ("score", "rating", "overall_score") is better, a lower rank ("rank", "ranking") is better.
They stand in the responses, or in a list beside them in the same order. Of equally good responses the first
is the best, of equally bad ones the last is the worst.
"""

from __future__ import annotations

import math

from lora_dpo.preferences.conversations import shown
from lora_dpo.preferences.records import RefusalError, Row

RESPONSES = ("responses", "completions", "answers")
TEXTS = ("response", "text", "content", "completion", "answer")
GRADES = ("score", "rating", "overall_score")
RANKS = ("rank", "ranking")
GRADE_LISTS = ("scores", "ratings")
RANK_LISTS = ("ranks", "rank", "rankings", "ranking")
PAIRS = (("response_0", "response_1"), ("response_a", "response_b"))
LABELS = ("better_response_id", "preferred", "preference")

CANDIDATE_LAYOUTS = {
    "ranked": "prompt, instruction or question; responses, completions or answers; with score, rating, "
    "overall_score or rank in each, or scores, ratings or ranks beside them",
    "labelled": "prompt, instruction or question; response_0, response_1 (or _a, _b); better_response_id, "
    "preferred or preference",
}


def is_ranked(row: Row) -> bool:
    return any(column in row for column in RESPONSES)


def is_labelled(row: Row) -> bool:
    return any(column in row for column in LABELS) and any(a in row and b in row for a, b in PAIRS)


def best_and_worst(row: Row) -> tuple[object, object]:
    """The best and the worst response: text or messages, not yet validated."""
    return _of_ranked(row) if is_ranked(row) else _of_labelled(row)


def _of_ranked(row: Row) -> tuple[object, object]:
    column = next(column for column in RESPONSES if column in row)
    responses = row[column]
    if not isinstance(responses, (list, tuple)) or len(responses) < 2:
        raise RefusalError("fewer than two responses", f"{column} is {shown(responses)}")
    merits = _merits(row, responses)
    best = max(range(len(merits)), key=lambda index: (merits[index], -index))
    worst = min(range(len(merits)), key=lambda index: (merits[index], -index))
    if merits[best] == merits[worst]:
        raise RefusalError("all responses have the same score")
    return _text(responses[best]), _text(responses[worst])


def _merits(row: Row, responses: list | tuple) -> list[float]:
    """A number for each response, higher is better."""
    for columns, sign in ((GRADE_LISTS, 1.0), (RANK_LISTS, -1.0)):
        for column in columns:
            if isinstance(beside := row.get(column), (list, tuple)):
                if len(beside) != len(responses):
                    raise RefusalError(
                        "missing score", f"{len(beside)} {column} for {len(responses)} responses"
                    )
                return [sign * _number(value, column) for value in beside]
    for keys, sign in ((GRADES, 1.0), (RANKS, -1.0)):
        for key in keys:
            if all(isinstance(response, dict) and response.get(key) is not None for response in responses):
                return [sign * _number(response[key], key) for response in responses]
    raise RefusalError("missing score", "the responses have no score, rating or rank that all of them share")


def _number(value: object, name: str) -> float:
    try:
        number = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        )
    except (ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise RefusalError("score is not a number", f"{name} is {shown(value)}")
    return number


def _text(response: object) -> object:
    if not isinstance(response, dict) or "role" in response or "from" in response:
        return response
    for key in TEXTS:
        if response.get(key) is not None:
            return response[key]
    raise RefusalError("content is not text", f"a response has none of {', '.join(TEXTS)}: {shown(response)}")


def _of_labelled(row: Row) -> tuple[object, object]:
    pair = next((a, b) for a, b in PAIRS if a in row and b in row)
    label = next(row[column] for column in LABELS if column in row)
    names = {name: index for index, column in enumerate(pair) for name in (column, column[-1])}
    text = label.lower() if isinstance(label, str) else str(label) if type(label) is int else ""
    if text not in names:
        raise RefusalError("unknown label", f"{shown(label)} names neither {pair[0]} nor {pair[1]}")
    better = names[text]
    return row[pair[better]], row[pair[1 - better]]
