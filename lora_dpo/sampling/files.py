"""Responses in a file of JSON lines, one line a prompt, that grows while they are made.

A line: {"id": the prompt's key, "prompt": messages or text, "responses": [{"text", "tokens", "finished",
"ids"}, …], "sampler": who drew them and how, and "tools" and "chat_template_kwargs" where the row had them}.
A judge that adds a score to each response makes a preference file of it, with ranked responses.

ids are the tokens that were drawn, with the one that ended the response: its text may be tokenized into
others, of which the policy thinks otherwise. tokens counts them without that one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from lora_dpo.errors import DataError, RunError
from lora_dpo.model import Model
from lora_dpo.preferences import Message
from lora_dpo.recipe import Sampling
from lora_dpo.reference import adapters_fingerprint, base_fingerprint
from lora_dpo.run_directory import GrowingFile, growing
from lora_dpo.sampling.decoding import Response
from lora_dpo.sampling.greedy import Role
from lora_dpo.sampling.noise import prompt_key
from lora_dpo.sampling.responses import sample
from lora_dpo.sampling.vllm import VLLM
from lora_dpo.tokenization import ChatTokenizer


class Record(Protocol):
    """What is answered: any record that `lora_dpo.preferences` loads."""

    @property
    def prompt(self) -> tuple[Message, ...] | str: ...
    @property
    def tools(self) -> tuple[dict[str, Any], ...] | None: ...
    @property
    def template_kwargs(self) -> Mapping[str, Any]: ...


class Shows(Protocol):
    """Where progress is shown: `lora_dpo.training.Display`."""

    def say(self, text: str) -> None: ...
    def counting(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


@dataclass(frozen=True)
class Counts:
    """prompts: different ones that were asked for. known: answered before, by the file. repeated: records
    whose prompt another one has. too_long: left out, by `longest`. responses, tokens, finished: of those made
    now; seconds: what that took.
    """

    prompts: int
    known: int
    repeated: int
    too_long: int
    responses: int
    tokens: int
    finished: int
    seconds: float


@dataclass(frozen=True)
class _Question:
    """A prompt to answer: its key, its token ids, and the record that it is of."""

    key: str
    ids: list[int]
    record: Record


def sampler_id(
    model: Model,
    settings: Sampling,
    stop_ids: Sequence[int],
    *,
    role: Role = "policy",
    base: str | None = None,
) -> str:
    """16 hexadecimal digits of who draws responses and how: the base, its adapters in that role, and all of
    the settings but memory. base: the base's fingerprint, where it is known.
    """
    names = {"policy": model.policy_adapters, "reference": model.reference_adapters, "base": ()}[role]
    told = dataclasses.asdict(settings)
    del told["tokens_in_cache"]
    facts = [base or base_fingerprint(model), adapters_fingerprint(model, names), told, sorted(stop_ids)]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())


def sample_to_file(
    model: Model | VLLM,
    chat: ChatTokenizer,
    records: Sequence[Record],
    settings: Sampling,
    file: Path,
    *,
    sampler: str,
    role: Role = "policy",
    display: Shows,
    longest: int | None = None,
) -> Counts:
    """Responses to the records' prompts, appended to a file; those that are there already stay.

    sampler: as `sampler_id` gives it. longest: prompts of more tokens are left out, and counted. A process
    that was killed anywhere goes on by the same call, and on a CPU ends with the same bytes. Raises RunError
    where the file is another sampler's, is being written, or can't be; DataError where the template refuses
    a prompt.
    """
    questions = list({q.key: q for q in _questions(records, chat)}.values())
    fitting = [q for q in questions if longest is None or len(q.ids) <= longest]
    began = time.perf_counter()
    with growing(file) as lines:
        there = _answered(lines, sampler)
        known = {n for n, question in enumerate(fitting) if question.key in there}

        def done(n: int, responses: Sequence[Response]) -> None:
            lines.append(_line(fitting[n], responses, chat, sampler))

        with display.counting("sampling", len(fitting) - len(known)) as advance:
            made = sample(
                model,
                [question.ids for question in fitting],
                settings,
                stop_ids=chat.end_of_turn_ids,
                role=role,
                keys=[question.key for question in fitting],
                known=known,
                done=done,
                progress=advance,
                say=display.say,
            )
    new = [response for responses in made for response in responses]
    return Counts(
        prompts=len(fitting),
        known=len(known),
        repeated=len(records) - len(questions),
        too_long=len(questions) - len(fitting),
        responses=len(new),
        tokens=sum(len(response.ids) for response in new),
        finished=sum(response.finished for response in new),
        seconds=time.perf_counter() - began,
    )


def _questions(records: Sequence[Record], chat: ChatTokenizer) -> list[_Question]:
    found = []
    for record in records:
        try:
            ids = chat.prompt_ids(record.prompt, record.tools, record.template_kwargs).tolist()
        except DataError as error:
            raise DataError(f"{getattr(record, 'where', 'a prompt')}: {error}") from error
        found.append(_Question(prompt_key(ids), ids, record))
    return found


def drawn(response: Response, stop_ids: Sequence[int]) -> list[int]:
    """All tokens that were drawn: the stop token too, the first of `stop_ids` where a response that ended
    doesn't know its own.
    """
    if not response.finished:
        return list(response.ids)
    return [*response.ids, stop_ids[0] if response.stop is None else response.stop]


def read_drawn(file: Path) -> dict[str, list[list[int]]]:
    """The tokens of all responses to each prompt, by its key. Raises RunError where a line lacks them."""
    found: dict[str, list[list[int]]] = {}
    with growing(file) as lines:
        for number, line in lines.lines():
            try:
                found[str(line["id"])] = [[int(token) for token in own["ids"]] for own in line["responses"]]
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(
                    f"{file} line {number} has no tokens: sample again, to another file"
                ) from error
    return found


def _answered(lines: GrowingFile, sampler: str) -> set[str]:
    """The keys of the prompts that a file answers. Raises RunError where somebody else answered them."""
    keys = set()
    for number, line in lines.lines():
        if line.get("sampler") != sampler:
            raise RunError(
                f"{lines.file} line {number} was drawn by another sampler ({line.get('sampler')}, this one is"
                f" {sampler}): the base, the adapter, its role or the sampling keys were others. Name another"
                " file, or delete it"
            )
        keys.add(str(line.get("id")))
    return keys


def _line(
    question: _Question, responses: Sequence[Response], chat: ChatTokenizer, sampler: str
) -> dict[str, Any]:
    record = question.record
    prompt = record.prompt if isinstance(record.prompt, str) else [dict(turn) for turn in record.prompt]
    line: dict[str, Any] = {"id": question.key, "prompt": prompt}
    line["responses"] = [
        {
            "text": chat.decode(response.ids),
            "tokens": len(response.ids),
            "finished": response.finished,
            "ids": drawn(response, chat.end_of_turn_ids),
        }
        for response in responses
    ]
    line["sampler"] = sampler
    if record.tools:
        line["tools"] = list(record.tools)
    if record.template_kwargs:
        line["chat_template_kwargs"] = dict(record.template_kwargs)
    return line
