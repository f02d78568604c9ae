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

from lora_dpo.preferences import Demonstration, Preference, Where
from lora_dpo.tokenization.chat import ChatTokenizer

TOKENIZATION = 1
"""Raise this whenever the same record and settings give other tokens, masks or drops than before."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def record_text(record: Preference | Demonstration) -> str | None:
    """A record as one line of JSON; None if it holds what JSON would change, such as a tuple."""
    pair = isinstance(record, Preference)
    texts = (record.prompt, record.chosen, record.rejected) if pair else (record.prompt, record.response)
    value = {
        "texts": [text if isinstance(text, str) else list(text) for text in texts],
        "tools": None if record.tools is None else list(record.tools),
        "template_kwargs": dict(record.template_kwargs),
        "where": [record.where.file, record.where.row],
    }
    try:
        text = json.dumps(value)
        return text if json.loads(text) == value else None
    except (TypeError, ValueError, RecursionError):
        return None


def record_from(text: str) -> Preference | Demonstration:
    """The record of a `record_text`."""
    value = json.loads(text)
    texts = [text if isinstance(text, str) else tuple(text) for text in value["texts"]]
    tools = None if value["tools"] is None else tuple(value["tools"])
    rest = (Where(*value["where"]), tools, value["template_kwargs"])
    if len(texts) == 2:
        return Demonstration(texts[0], texts[1], *rest)
    return Preference(texts[0], texts[1], texts[2], *rest)


def tokenizer_from(settings: dict[str, Any]) -> ChatTokenizer:
    """A ChatTokenizer from `ChatTokenizer.settings`. Only if its own settings are the same is it a copy."""
    core = Tokenizer.from_str(settings["backend"])
    tokenizer = TokenizersBackend(tokenizer_object=core, **settings["special"])
    tokenizer.chat_template = settings["template"]
    return ChatTokenizer(tokenizer, None, settings["max_tokens"], settings["max_prompt_tokens"])


def settings_digest(settings: dict[str, Any] | None) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def corpus_key(
    records: Iterable[Preference | Demonstration], tokenizer: ChatTokenizer, skip_refused: bool
) -> str | None:
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
