"""An adapter for others: PEFT's layout, its tokenizer and template, and what it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lora_dpo.export.destination import refuse_existing
from lora_dpo.finished import check_adapter
from lora_dpo.model import RECORD, load_tokenizer, read_adapter, read_record
from lora_dpo.model.saved import CONFIG, TENSORS
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base
from lora_dpo.run_directory import MANIFEST, RunDirectory, grow_folder, need_space

TOKENIZER = "tokenizer_config.json"
TOKENIZERS = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer may be made of."""


class Trained(Protocol):
    """What is exported: an adapter's folder, the base under it, and the run that wrote it, where one did."""

    @property
    def adapter(self) -> Path: ...
    @property
    def base(self) -> Base: ...
    @property
    def run(self) -> RunDirectory | None: ...


def export_adapter(
    source: RunDirectory | Trained, to: Path, finish: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Copy an adapter, its tokenizer and template to a new folder, in PEFT's layout.

    A run's is copied to the byte, all but the manifest. Of another folder what makes up the adapter is, and
    nothing else: no optimizer's state, no pickles. Where its config names no base, or no revision, it gets
    the source's; where it has no tokenizer, the base's. finish: adds to the folder before it is in its place.
    Raises RunError if a run has no whole adapter yet or
    the folder is there already, ModelError if another adapter can't be used.
    """
    run = source if isinstance(source, RunDirectory) else source.run
    if run is not None:
        check_adapter(run)
        files = [f for f in sorted(run.adapter_folder.iterdir()) if f.is_file() and f.name != MANIFEST]
        base = None
    else:
        assert not isinstance(source, RunDirectory)
        files, base = _parts(source.adapter), source.base
    need_space(to, sum(file.stat().st_size for file in files), "the adapter")

    def fill(part: Path) -> None:
        refuse_existing(to)
        _fill(part, files, base)
        finish(part)

    refuse_existing(to)
    grow_folder(to, fill, fresh=True)
    return to


def _parts(folder: Path) -> list[Path]:
    """The files of a folder that somebody else may have written. Raises ModelError."""
    read_adapter(str(folder), "the adapter", kind="any")
    read_record(folder)
    names = [CONFIG, TENSORS, RECORD]
    names += TOKENIZERS if (folder / TOKENIZER).is_file() else ()
    return [folder / name for name in names if (folder / name).is_file()]


def _fill(part: Path, files: list[Path], base: Base | None) -> None:
    for file in files:
        shutil.copyfile(file, part / file.name)
    if base is None:
        return
    _name_base(part / CONFIG, base)
    if not (part / TOKENIZER).is_file():
        load_tokenizer(base).save_pretrained(str(part))


def _name_base(config: Path, base: Base) -> None:
    """Fill in what the config lacks; what it says stays."""
    values = read_json(config, "the adapter")
    told = dict(values)
    told["base_model_name_or_path"] = values.get("base_model_name_or_path") or base.model
    if told["base_model_name_or_path"] == base.model and base.revision is not None:
        told["revision"] = values.get("revision") or base.revision
    if told != values:
        config.write_text(json.dumps(told, indent=2, sort_keys=True), encoding="utf-8")
