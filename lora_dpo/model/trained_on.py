"""What an adapter was trained on: written beside it, and compared with the base that it is put on.

A low-rank update means something on the weights that it was trained on only, and a name does not say which
those were: repositories move, folders are overwritten. So the record holds a hash of the weights themselves.
The same base in another folder, or in other shards, is the same. The hash of a base is remembered in the
cache folder as long as its files are what they were: a large one is read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel

from lora_dpo.errors import ModelError, RunError
from lora_dpo.model.base import architecture_of
from lora_dpo.model.stored import commit_of, hash_of, weight_files
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base
from lora_dpo.run_directory import cache_folder, in_words, write_text

RECORD = "trained_on.json"
FORMAT = 1

SAID_FROM = 4 * 2**30
"""Bytes of a base whose reading is said: from a disk it may take seconds."""

JUST_WRITTEN = 2.0
"""Seconds within which a file system's clock may give two writes the same time: nothing is remembered."""


@dataclass(frozen=True)
class TrainedOn:
    """model, revision: as the recipe named the base. commit: the hub's, of what was loaded; else None.

    content: the base's `content_hash`; None where its files could not be read as they lie. architecture: the
    class of the model. quantization, double_quantization, compute_dtype: how it was trained on. template:
    SHA-256 of the chat template; None where there was none. lora_dpo: the version that wrote this.
    """

    model: str
    revision: str | None
    commit: str | None
    content: str | None
    architecture: str
    quantization: str
    double_quantization: bool
    compute_dtype: str
    template: str | None
    lora_dpo: str

    def to_json(self) -> str:
        """The text of adapter/trained_on.json."""
        values = vars(self)
        base = {name: values[name] for name in OF_THE_BASE}
        rest = {name: value for name, value in values.items() if name not in OF_THE_BASE}
        return json.dumps({"format": FORMAT, "base": base, **rest}, indent=1) + "\n"

    def described(self) -> str:
        """Name and revision, for a person; the name may be anybody's."""
        return _named(self.model, self.commit or self.revision)


OF_THE_BASE = ("model", "revision", "commit", "content", "architecture")
"""Keys that lie under "base" in the file."""

PATTERNS = {"content": "[0-9a-f]{32}", "template": "[0-9a-f]{64}"}


def read_record(folder: Path) -> TrainedOn | None:
    """What an adapter's folder says of its base; None where it says nothing, as adapters made elsewhere do.

    Raises ModelError where the file is none.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    values = read_json(file, "the adapter")
    if values.get("format") != FORMAT:
        raise ModelError(
            f"{file} has format {values.get('format')!r:.40}; this version reads format {FORMAT}"
        )
    base = values.get("base")
    found = {**values, **base} if isinstance(base, dict) else values
    taken = {}
    for field in fields(TrainedOn):
        value = found.get(field.name)
        kind, _, optional = str(field.type).partition(" | ")
        right = isinstance(value, bool if kind == "bool" else str) or (value is None and bool(optional))
        pattern = PATTERNS.get(field.name)
        if not right or (pattern and value is not None and not re.fullmatch(pattern, str(value))):
            raise ModelError(f"{file} is damaged: {field.name} is {value!r:.80}")
        taken[field.name] = value
    return TrainedOn(**taken)


def record_of(
    base: Base,
    network: PreTrainedModel,
    compute_dtype: torch.dtype,
    template: str | None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> TrainedOn:
    """The record of an adapter on this base, as its files are now. template: the chat template's text.

    say: is told where this takes seconds, and where the weights can't be hashed: the record then holds no
    hash, and the adapter is taken for any base.
    """
    commit = content = None
    try:
        commit, content = commit_of(base), content_hash(base, say=say)
    except ModelError as error:
        say(f"note: the adapter will not be held to this base, whose weights cannot be hashed: {error}")
    return TrainedOn(
        model=base.model,
        revision=base.revision,
        commit=commit,
        content=content,
        architecture=type(network).__name__,
        quantization=base.quantization,
        double_quantization=base.double_quantization,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        template=template_hash(template),
        lora_dpo=_version(),
    )


def write_record(record: TrainedOn, folder: Path) -> None:
    """Write it beside an adapter, straight into the folder. Raises OSError."""
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")


def template_hash(template: str | None) -> str | None:
    """SHA-256 of a chat template, 64 hexadecimal digits; None for none."""
    if template is None:
        return None
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def check_base(record: TrainedOn | None, base: Base | None, what: str) -> None:
    """Raise ModelError where an adapter was trained on another architecture or on other weights than this
    base's.

    what: the adapter, for the error. An adapter without a record is taken; so is one without a hash in it,
    of which `base_notes` tells.
    """
    if record is None or base is None:
        return
    _check_architecture(record, base, what)
    if record.content is None:
        return
    here = content_hash(base)
    if here != record.content:
        raise ModelError(
            f"{what} was trained on another base: on {record.described()}, whose weights have the hash"
            f" {record.content}; base.model {_named(base.model, base.revision)} has {here}. Give the base"
            " that it was trained on as base.model; where these weights are meant, a copy of the adapter's"
            f" folder without {RECORD} is taken on any base"
        )


def _check_architecture(record: TrainedOn, base: Base, what: str) -> None:
    try:
        here = architecture_of(base)
    except ModelError:  # no config that can be read: whatever loads the base says so
        return
    if here is not None and here != record.architecture:
        raise ModelError(
            f"{what} was trained on another architecture: on a {record.architecture!r:.80}, and base.model"
            f" {_named(base.model, base.revision)} is a {here}. Give the base that it was trained on as"
            f" base.model; where this one is meant, a copy of the adapter's folder without {RECORD} is taken"
            " on any base"
        )


def record_notes(record: TrainedOn | None, base: Base, template: str | None, what: str) -> list[str]:
    """What is otherwise than when an adapter was trained, and allowed, a line each. what: the adapter."""
    if record is None:
        return []
    lines = base_notes(record, base, what)
    if record.template != template_hash(template):
        had = "another chat template" if record.template else "no chat template"
        lines.append(
            f"note: {what} was trained with {had}: its own tokenizer is in its folder, and data.chat_template"
            " takes a template's file"
        )
    return lines


def base_notes(record: TrainedOn, base: Base, what: str) -> list[str]:
    """What of `record_notes` is about the base."""
    lines = []
    if record.content is None:
        lines.append(
            f"note: {what} holds no hash of the weights that it was trained on, {record.described()}: whether"
            f" {_named(base.model, base.revision)} are those could not be checked"
        )
    then = _storage(record.quantization, record.double_quantization)
    now = _storage(base.quantization, base.double_quantization)
    if then != now:
        lines.append(
            f"note: {what} was trained on the base in {then}, and is used on it in {now}: together they are"
            " not quite what was trained"
        )
    return lines


def content_hash(base: Base, *, say: Callable[[str], None] = lambda line: None) -> str:
    """A hash of a base's weights as they lie on disk, 32 hexadecimal digits; see `hash_of`.

    Of a hub id those in the local cache: nothing is fetched. say: is told before a large base is read.
    Raises ModelError where the files are not there, or are damaged.
    """
    files = weight_files(base)
    facts = _facts(files)
    memo = _memo(facts)
    known = _remembered(memo, facts)
    if known is not None:
        return known
    size = sum(fact[1] for fact in facts)
    if size >= SAID_FROM:
        say(f"hashing the base's {in_words(size)} of weights, once: the adapter will name them")
    content = hash_of(files)
    if _facts(files) == facts and not _just_written(facts):
        # Only to be quick the next time: where it can't be kept, all is read again.
        with contextlib.suppress(OSError, RunError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_text(memo, _memo_text(facts, content))
    return content


def _facts(files: list[Path]) -> list[list[Any]]:
    """[path, bytes, times of writing and of change in ns, inode] of each file, links followed."""
    try:
        found = []
        for file in files:
            place = file.resolve(strict=True)
            told = place.stat()
            found.append([str(place), told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino])
        return found
    except OSError as error:
        raise ModelError(f"base.model: {error.filename} cannot be read: {error.strerror}") from error


def _memo(facts: list[list[Any]]) -> Path:
    names = "\0".join(fact[0] for fact in facts)
    name = xxhash.xxh3_128_hexdigest(names.encode("utf-8", "surrogateescape"))
    return cache_folder() / "bases" / f"{name}.json"


def _memo_text(facts: list[list[Any]], content: str) -> str:
    told = json.dumps({"format": FORMAT, "files": facts, "content": content})
    return f"{told}\n{xxhash.xxh3_64_hexdigest(told.encode())}\n"


def _remembered(memo: Path, facts: list[list[Any]]) -> str | None:
    """The hash of these very files; None where nothing is kept of them, or what is kept is damaged."""
    try:
        text = memo.read_text(encoding="utf-8")
        content = json.loads(text.split("\n")[0])["content"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) and text == _memo_text(facts, content) else None


def _just_written(facts: list[list[Any]]) -> bool:
    return abs(time.time() - max(fact[2] for fact in facts) / 1e9) < JUST_WRITTEN


def _storage(quantization: str, double: bool) -> str:
    """How a base's linear layers are stored, in words."""
    if quantization == "none":
        return "no quantization"
    return f"{quantization} with double quantization" if double and quantization != "int8" else quantization


def _named(model: str, revision: str | None) -> str:
    name = model if model.isprintable() and len(model) < 500 else f"{model!r:.500}"
    return f"{name} ({revision!r:.80})" if revision else name


def _version() -> str:
    from lora_dpo import __version__

    return __version__
