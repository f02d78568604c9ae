"""Records and tokenizers as JSON: what a cache key is made of, and what a worker process is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend

from lora_dpo.preferences import AnyRecord, Demonstration, Preference, Rating, Where
from lora_dpo.tokenization.chat import ChatTokenizer

TOKENIZATION = 3
"""Raise this whenever the same record and settings give other tokens, masks, values or drops than before."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def record_text(record: AnyRecord) -> str | None:
    """A record as one line of JSON; None if it holds what JSON would change, such as a tuple."""
    value = {
        "kind": type(record).__name__,
        "texts": [text if isinstance(text, str) else list(text) for text in _texts(record)],
        "tools": None if record.tools is None else list(record.tools),
        "template_kwargs": dict(record.template_kwargs),
        "where": [record.where.file, record.where.row],
        "values": dict(record.values),
    }
    try:
        text = json.dumps(value)
        return text if json.loads(text) == value else None
    except (TypeError, ValueError, RecursionError):
        return None


def _texts(record: AnyRecord) -> list[Any]:
    """All messages and texts of a record: of a rating with the mismatched response, if it has one."""
    if isinstance(record, Preference):
        return [record.prompt, record.chosen, record.rejected]
    if isinstance(record, Rating) and record.mismatched is not None:
        return [record.prompt, record.response, record.mismatched]
    return [record.prompt, record.response]


def record_from(text: str) -> AnyRecord:
    """The record of a `record_text`."""
    value = json.loads(text)
    prompt, response, *others = (text if isinstance(text, str) else tuple(text) for text in value["texts"])
    tools = None if value["tools"] is None else tuple(value["tools"])
    rest = (Where(*value["where"]), tools, value["template_kwargs"], value["values"])
    if value["kind"] == Rating.__name__:
        mismatched = others[0] if others else None
        return Rating(prompt, response, bool(value["values"]["desirable"]), *rest, mismatched)
    if value["kind"] == Demonstration.__name__:
        return Demonstration(prompt, response, *rest)
    return Preference(prompt, response, others[0], *rest)


def tokenizer_from(settings: dict[str, Any]) -> ChatTokenizer:
    """A ChatTokenizer from `ChatTokenizer.settings`. Only if its own settings are the same is it a copy."""
    core = Tokenizer.from_str(settings["backend"])
    tokenizer = TokenizersBackend(tokenizer_object=core, **settings["special"])
    tokenizer.chat_template = settings["template"]
    return ChatTokenizer(tokenizer, None, settings["max_tokens"], settings["max_prompt_tokens"])


def settings_digest(settings: dict[str, Any] | None) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def corpus_key(records: Iterable[AnyRecord], tokenizer: ChatTokenizer, skip_refused: bool) -> str | None:
    """A hash of all that decides what `tokenize` gives; None if it can't be had for these."""
    settings = tokenizer.settings()
    if settings is None:
        return None
    # Templates can write today's date (Llama 3.1's does).
    today = date.today().isoformat() if "strftime_now" in json.dumps(settings["template"]) else None
    libraries = [version(name) for name in _LIBRARIES]
    facts = [TOKENIZATION, libraries, today, settings_digest(settings), bool(skip_refused)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for record in records:
        text = record_text(record)
        if text is None:
            return None
        digest.update(b"\n" + text.encode())
    return digest.hexdigest()
