"""A merged model: made, compared, described, and only then put in its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.card.card import write_card
from lora_dpo.export.destination import refuse_existing
from lora_dpo.export.merging.files import SHARD_SIZE, Settings, clear, merge
from lora_dpo.export.merging.kept import Kept, joined
from lora_dpo.export.proof.prove import EXAMPLES, prove
from lora_dpo.export.proof.report import FILE, Kind, Report, describe, write_report
from lora_dpo.export.proof.rows import rows_for
from lora_dpo.export.source import Source
from lora_dpo.model import load_tokenizer
from lora_dpo.run_directory import grow_folder, write_text
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Display

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Options:
    """How an export is made.

    dtype: what weights are stored in. base: "dequantized" adds the update to the weights that were trained
    on, which gives the function that was trained; "original" to those of the base's files, which gives
    another one. shard_size: bytes of a file. verify: whether what was made is reloaded and compared with
    base + adapter; by default a merged model is, and an adapter, which is copied, is not. data: rows for
    that, instead of those that the run held out; examples: how many of them. accept: take what misses the
    bars. llama_cpp: a folder with llama.cpp's converters. repository: the hub's name of what is made, for its
    card.
    """

    dtype: Dtype = "bfloat16"
    base: Literal["dequantized", "original"] = "dequantized"
    shard_size: int = SHARD_SIZE
    verify: bool | None = None
    data: str | None = None
    examples: int = EXAMPLES
    accept: bool = False
    llama_cpp: Path | None = None
    repository: str | None = None

    @property
    def settings(self) -> Settings:
        return Settings(getattr(torch, self.dtype), self.base == "original", self.shard_size)


def export_merged(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Report:
    """A plain transformers model in a new folder, with its proof and its card.

    Raises RunError where something is there already, where there is no room, and where a bar is missed
    without `accept`; then what was made waits beside its place, and the same call with `accept` takes it.
    ModelError for what can't be merged, and where a weight doesn't fit the dtype.
    """
    options, display = options or Options(), display or Display(quiet=True)
    made: list[Report] = []

    def fill(part: Path) -> None:
        refuse_existing(to)  # another process may have been quicker
        made.append(merge_and_prove(source, part, options, display))
        write_card(part, source, made[0].as_dict(), "merged", repository=options.repository)
        clear(part)

    refuse_existing(to)
    grow_folder(to, fill)
    return made[0]


def merge_and_prove(source: Source, folder: Path, options: Options, display: Display) -> Report:
    """Fill a folder with the merged model, tokenizer and report. Raises RunError where a bar is missed."""
    named = options.data is not None and options.verify is not False
    # Read before the minutes that a merge takes: what somebody typed may be wrong.
    rows = rows_for(source, "merged", options.data, options.examples, display) if named else None
    kept = merge(source.base, source.adapter, folder, options.settings, counting=_megabytes(display))
    tokenizer_of(source).save(folder)
    weights = _weights(kept)
    if options.verify is not False:
        report = prove(
            source,
            folder,
            dtype=options.dtype,
            base=options.base,
            weights=weights,
            rows=rows,
            examples=options.examples,
            accept=options.accept,
            display=display,
        )
    else:
        why = "it was not asked for (--no-verify)"
        report = Report(
            "merged", options.dtype, options.base, weights, not_compared=why, accept=options.accept
        )
        write_report(report, folder)
    say_all(display, describe(report))
    waits = f"what was made waits in {folder}: the same command with --accept takes it, or delete the folder"
    judge(report, options, waits)
    return report


def judge(report: Report, options: Options, left: str) -> None:
    """Raise RunError where a bar was missed that nobody accepted. left: what became of it."""
    if report.passed is False and not options.accept:
        raise RunError(f"not exported, for it is not what was trained (see above); {left}")


def _weights(kept: dict[str, Kept]) -> dict[str, Any]:
    whole = joined(kept.values())
    layers = [
        {"name": name, "update": one.size, "kept": one.kept, "error": one.error} for name, one in kept.items()
    ]
    return {"kept": whole.kept, "error": whole.error, "layers": layers}


def _megabytes(display: Display) -> Callable[[str, int], Any]:
    """The display's counting, of bytes by the million."""

    @contextmanager
    def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with display.counting(f"{what}, MB", total // 10**6) as advance:
            left = 0

            def more(count: int) -> None:
                nonlocal left
                left += count
                if left >= 10**6:
                    advance(left // 10**6)
                    left %= 10**6

            yield more

    return counting


def tokenizer_of(source: Source) -> ChatTokenizer:
    """The adapter's own tokenizer and template where its folder has them, else the base's."""
    if not (source.adapter / "tokenizer_config.json").is_file():
        return ChatTokenizer(load_tokenizer(source.base))
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source.adapter))
    except Exception as error:  # whatever transformers raises over somebody else's files
        raise ModelError(f"the tokenizer in {source.adapter} cannot be loaded: {error}") from error
    return ChatTokenizer(found)


def say_all(display: Display, lines: list[str]) -> None:
    for line in lines:
        display.say(line)


def finish(folder: Path, source: Source, report: dict[str, Any], kind: Kind, options: Options) -> None:
    write_text(folder / FILE, json.dumps(report, indent=1) + "\n")
    write_card(folder, source, report, kind, repository=options.repository)
