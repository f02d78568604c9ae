"""Each kind of export, from the source to a folder in its place: made, compared, described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.adapter import export_adapter, refuse_existing
from lora_dpo.export.card.card import write_card
from lora_dpo.export.gguf.converter import ADAPTERS, MODELS, find_converter, not_found
from lora_dpo.export.gguf.making import (
    expected_bytes,
    export_gguf,
    export_gguf_adapter,
    gguf_adapter_command,
    gguf_command,
)
from lora_dpo.export.merging.files import SHARD_SIZE, Settings, clear, merge
from lora_dpo.export.merging.kept import Kept, joined
from lora_dpo.export.ollama.modelfile import write_modelfile
from lora_dpo.export.proof.prove import EXAMPLES, prove
from lora_dpo.export.proof.report import FILE, Kind, Report, describe, write_report
from lora_dpo.export.serving.commands import commands
from lora_dpo.export.serving.linter import lint
from lora_dpo.export.source import Source
from lora_dpo.model import load_tokenizer
from lora_dpo.run_directory import grow_folder, write_folder, write_text
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


def export(
    source: Source,
    kind: Kind,
    to: Path | None = None,
    options: Options | None = None,
    *,
    display: Display | None = None,
) -> Path:
    """Export to a new folder, by default `export-KIND` in the run's or beside the adapter's; returns it.

    Raises what the function for its kind raises.
    """
    options, display = options or Options(), display or Display(quiet=True)
    if to is None:
        home = source.run.path if source.run else source.adapter.resolve().parent
        to = home / (f"export-{kind}" if source.run else f"{source.name}-export-{kind}")
    refuse_existing(to)
    makers: dict[Kind, Callable[..., object]] = {
        "adapter": _export_adapter,
        "merged": export_merged,
        "gguf": export_to_gguf,
        "gguf-adapter": export_to_gguf_adapter,
        "ollama": export_to_ollama,
    }
    makers[kind](source, to, options, display=display)
    display.say(f"{kind}: {to}")
    return to


def _export_adapter(source: Source, to: Path, options: Options, *, display: Display) -> None:
    def finish(part: Path) -> None:
        if options.verify:
            report = prove(
                source,
                part,
                dtype="float32",
                kind="adapter",
                data=options.data,
                examples=options.examples,
                accept=options.accept,
                display=display,
            )
            _say(display, describe(report))
            _judge(report, options, "nothing is kept of it")
        else:
            report = Report("adapter", "float32", not_compared="these are the adapter's own files")
        _finish(part, source, report.as_dict(), "adapter", options)

    export_adapter(source, to, finish)
    for finding in lint(to, source.base):
        display.say(str(finding))
    for server, line in commands(to, source.base).items():
        display.say(f"\n{server}:\n{line}")


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
        made.append(merge_and_prove(source, part, options, display))
        write_card(part, source, made[0].as_dict(), "merged", repository=options.repository)
        clear(part)

    refuse_existing(to)
    grow_folder(to, fill)
    return made[0]


def merge_and_prove(source: Source, folder: Path, options: Options, display: Display) -> Report:
    """Fill a folder with the merged model, tokenizer and report. Raises RunError where a bar is missed."""
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
            data=options.data,
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
    _say(display, describe(report))
    waits = f"what was made waits in {folder}: the same command with --accept takes it, or delete the folder"
    _judge(report, options, waits)
    return report


def _judge(report: Report, options: Options, left: str) -> None:
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


def export_to_gguf(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Path:
    """A folder with a GGUF file of the merged model, its proof and its card. Returns the file.

    Raises what `export_merged` raises, and ModelError without llama.cpp's converter or with what the look at
    its file found.
    """
    options, display = options or Options(), display or Display(quiet=True)
    name = f"{source.name}-{options.dtype}.gguf"
    converter = find_converter(options.llama_cpp, MODELS)
    if converter is None:
        raise not_found(MODELS, gguf_command(Path("MERGED"), to / name, options.dtype, None))

    def fill(part: Path) -> None:
        merged = part / "merged"
        merged.mkdir(exist_ok=True)
        report = merge_and_prove(source, merged, options, display)
        (part / name).unlink(missing_ok=True)
        total = expected_bytes(merged, options.dtype) >> 20
        with display.counting("converting, MiB", total) as advance:
            made = export_gguf(
                merged, part / name, options.dtype, converter, accept=options.accept, progress=advance
            )
        _say(display, made.describe())
        _say(display, write_modelfile(part, merged, source=part / name).describe())
        _finish(part, source, _with_file(report, made, "gguf"), "gguf", options)
        shutil.rmtree(merged)

    refuse_existing(to)
    grow_folder(to, fill)
    return to / name


def export_to_gguf_adapter(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Path:
    """A folder with the adapter as a GGUF file, for whoever serves it on a base of his own."""
    options, display = options or Options(), display or Display(quiet=True)
    name = f"{source.name}-adapter.gguf"
    converter = find_converter(options.llama_cpp, ADAPTERS)
    if converter is None:
        raise not_found(ADAPTERS, gguf_adapter_command(source.adapter, source.base, to / name, None))

    def fill(part: Path) -> None:
        made = export_gguf_adapter(
            source.adapter,
            source.base,
            part / name,
            converter,
            accept=options.accept,
        )
        _say(display, made.describe())
        report = Report("gguf-adapter", "float32", not_compared="a GGUF file is not run here")
        _finish(part, source, _with_file(report, made, "gguf-adapter"), "gguf-adapter", options)

    refuse_existing(to)
    write_folder(to, fill)
    return to / name


def export_to_ollama(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Report:
    """A merged model with a Modelfile that names it."""
    options, display = options or Options(), display or Display(quiet=True)
    made: list[Report] = []

    def fill(part: Path) -> None:
        made.append(merge_and_prove(source, part, options, display))
        _say(display, write_modelfile(part, part).describe())
        _finish(part, source, made[0].as_dict() | {"kind": "ollama"}, "ollama", options)
        clear(part)

    refuse_existing(to)
    grow_folder(to, fill)
    return made[0]


def _say(display: Display, lines: list[str]) -> None:
    for line in lines:
        display.say(line)


def _with_file(report: Report, made: Any, kind: Kind) -> dict[str, Any]:
    """The report of what was converted, with what the look at the converted file found."""
    facts = report.as_dict() | {"kind": kind}
    if made.check is None:
        return facts | {"file": {"checked": False}}
    found = list(made.check.findings)
    passed = False if found or report.passed is False else True if report.passed is None else report.passed
    failed = [*facts["failed"], *found]
    return facts | {"passed": passed, "failed": failed, "file": {"checked": True, "findings": found}}


def _finish(folder: Path, source: Source, report: dict[str, Any], kind: Kind, options: Options) -> None:
    write_text(folder / FILE, json.dumps(report, indent=1) + "\n")
    write_card(folder, source, report, kind, repository=options.repository)
