"""Samples in, judged samples out: JSON lines, a line a prompt, that a kill leaves whole.

A judged line is the line of the samples with a "score" in each response and the "judge" beside: an ordinary
preference file of ranked responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.errors import DataError, RunError
from lora_dpo.judging.judges import Candidates, JudgeProtocol, at_once, check_rewards, notes_of, tag
from lora_dpo.preferences import Where
from lora_dpo.preferences.json_rows import read_jsonl
from lora_dpo.preferences.records import RefusalError
from lora_dpo.preferences.validate import check_unicode, template_kwargs_of, tools_of
from lora_dpo.run_directory import GrowingFile, growing
from lora_dpo.training import Display


@dataclass(frozen=True, eq=False)
class Sampled:
    """A line of a samples file, and what is judged of it."""

    where: Where
    line: dict[str, Any]
    candidates: Candidates

    @property
    def scores(self) -> list[float]:
        """Of each response the judge's reward. Raises DataError where the line isn't judged."""
        found = [response.get("score") for response in self.line["responses"]]
        if any(type(score) not in (int, float) or not math.isfinite(score) for score in found):
            raise DataError(f"{self.where}: a response has no score: judge the samples first (reward score)")
        return [float(score) for score in found]

    def check_judged(self) -> None:
        """Raise DataError where a response has no reward."""
        _ = self.scores


@dataclass(frozen=True)
class Judged:
    """prompts, responses: in the judged file. already: prompts that were judged before. mean: reward of a
    response. spread: standard deviation of the rewards of a prompt, meaned over prompts.
    """

    prompts: int
    responses: int
    already: int
    mean: float
    spread: float


def read_samples(file: Path) -> list[Sampled]:
    """The lines of a samples file, or of a judged one. Raises DataError naming file and row."""
    try:
        with file.open("rb") as stream:
            return [_sampled(where, row) for where, row in read_jsonl(stream, str(file))]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def is_samples(file: Path) -> bool:
    """Whether the first line holds responses as samples do, objects with a "text"; judged or not."""
    try:
        with file.open("rb") as stream:
            row = next((row for _, row in read_jsonl(stream, str(file))), None)
    except OSError:
        return False  # a folder, or a hub id: preferences
    if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("responses"), list):
        return False
    return bool(row["responses"]) and all(isinstance(r, dict) and "text" in r for r in row["responses"])


def judge_file(judge: JudgeProtocol, samples: Path, output: Path, display: Display | None = None) -> Judged:
    """Judge every prompt of a samples file; those that `output` holds already are not judged again.

    A last line that a kill cut off is judged anew. Raises DataError for samples that can't be read, RunError
    where `output` is another judge's or was made from other samples, and what the judge raises; what was
    judged until then stays.
    """
    display = display or Display(quiet=True)
    rows = read_samples(samples)
    if not rows:
        raise DataError(f"{samples}: there are no samples")
    with growing(output) as lines:
        done = _judged_before(judge, rows, lines)
        if done:
            display.say(f"judging: {done} of {len(rows)} prompts are judged already in {output}")
        with display.counting("judging", len(rows)) as advance:
            advance(done)
            for start in range(0, len(rows), at_once(judge)):
                new = max(start, done)
                if new < min(start + at_once(judge), len(rows)):
                    # A kill may leave a part of a group: a model is given all of it again.
                    first = start if getattr(judge, "whole_groups", False) else new
                    group = rows[first : start + at_once(judge)]
                    advance(first - new)
                    lines.extend(_judge(judge, group, advance)[new - first :])
    for line in notes_of(judge):
        display.say(f"judge: {line}")
    return _summary(read_samples(output), done)


def judged_line(row: Sampled, rewards: Sequence[float], judge: JudgeProtocol) -> dict[str, Any]:
    """The line of a judged file."""
    responses = [
        {**response, "score": float(reward)}
        for response, reward in zip(row.line["responses"], rewards, strict=True)
    ]
    return {**row.line, "responses": responses, "judge": tag(judge)}


def _judge(
    judge: JudgeProtocol, group: Sequence[Sampled], advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    candidates = [row.candidates for row in group]
    rewards = judge(candidates, advance)
    check_rewards(judge, candidates, rewards)
    return [judged_line(row, own, judge) for row, own in zip(group, rewards, strict=True)]


def _judged_before(judge: JudgeProtocol, rows: Sequence[Sampled], lines: GrowingFile) -> int:
    """How many lines are there; half a line at the end is cut off. Raises RunError for somebody else's."""
    before = [_sampled(Where(str(lines.file), number), line) for number, line in lines.lines()]
    if len(before) > len(rows):
        raise RunError(f"{lines.file} holds more prompts than the samples: name another file")
    for old, row in zip(before, rows, strict=False):
        if old.line.get("judge") != tag(judge):
            raise RunError(
                f"{old.where} was judged by {old.line.get('judge')}, and this judge is {tag(judge)}: name"
                " another file, or delete this one"
            )
        same = (old.candidates.id, old.candidates.responses) == (row.candidates.id, row.candidates.responses)
        if not same:
            raise RunError(
                f"{old.where} was made from other samples than {row.where}: name another file, or delete"
                " this one"
            )
        old.check_judged()
    return len(before)


def _summary(rows: Sequence[Sampled], already: int) -> Judged:
    scores = [row.scores for row in rows]
    every = [score for own in scores for score in own]
    spread = float(np.mean([np.std(own) for own in scores]))
    return Judged(len(rows), len(every), already, float(np.mean(every)), spread)


def _sampled(where: Where, row: object) -> Sampled:
    if isinstance(row, RefusalError):
        raise DataError(f"{where}: {row.reason}: {row.detail}")
    try:
        check_unicode(row, "the line")
        columns = row if isinstance(row, dict) else {}
        tools, kwargs = tools_of(columns), template_kwargs_of(columns)  # as preference files call them
    except RefusalError as refusal:
        raise DataError(f"{where}: {refusal.reason}: {refusal.detail}") from None
    if not isinstance(row, dict) or not isinstance(row.get("responses"), list) or not row["responses"]:
        raise DataError(f'{where}: a line of samples has "id", "prompt" and "responses"')
    responses = list(_responses(where, row["responses"]))
    prompt, name = row.get("prompt"), row.get("id")
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt
    )
    if not (isinstance(prompt, str) or (messages and prompt)):
        raise DataError(f'{where}: "prompt" is a list of messages, or rendered text')
    if not isinstance(name, str) or not name:
        raise DataError(f'{where}: "id" names the prompt')
    told = all("finished" in r and "tokens" in r for r in responses)
    candidates = Candidates(
        id=name,
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        responses=tuple(r["text"] for r in responses),
        tools=tools,
        template_kwargs=kwargs,
        tokens=tuple(int(r["tokens"]) for r in responses) if told else (),
        finished=tuple(bool(r["finished"]) for r in responses) if told else (),
    )
    return Sampled(where, row, candidates)


def _responses(where: Where, responses: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for number, response in enumerate(responses, start=1):
        right = isinstance(response, dict) and isinstance(response.get("text"), str)
        if not right or not isinstance(response.get("finished", True), bool):
            raise DataError(f'{where}: response {number} takes "text", "tokens" and "finished"')
        if type(response.get("tokens", 0)) is not int or response.get("tokens", 0) < 0:
            raise DataError(f'{where}: "tokens" of response {number} is a count')
        yield response
