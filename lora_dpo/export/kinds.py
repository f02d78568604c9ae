"""Every kind of export by its name, each put in its place whole."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.adapter import export_adapter
from lora_dpo.export.destination import destination, refuse_existing
from lora_dpo.export.gguf.converter import ADAPTERS, MODELS, find_converter, not_found
from lora_dpo.export.gguf.making import (
    GgufExport,
    expected_bytes,
    export_gguf,
    export_gguf_adapter,
    gguf_adapter_command,
    gguf_command,
)
from lora_dpo.export.making import Options, export_merged, finish, judge, merge_and_prove, say_all
from lora_dpo.export.merging.files import clear
from lora_dpo.export.ollama.modelfile import write_modelfile
from lora_dpo.export.proof.prove import prove
from lora_dpo.export.proof.report import Kind, Report, describe
from lora_dpo.export.serving.commands import commands, sequence_classifier
from lora_dpo.export.serving.linter import lint
from lora_dpo.export.source import Source
from lora_dpo.run_directory import grow_folder
from lora_dpo.training import Display


def export(
    source: Source,
    kind: Kind,
    to: Path | None = None,
    options: Options | None = None,
    *,
    display: Display | None = None,
) -> Path:
    """Export to a new folder, by default `export-KIND` in the run's or beside the adapter's; returns it.

    Raises what the function for its kind raises, and RunError for what can't be made of a reward model.
    """
    options, display = options or Options(), display or Display(quiet=True)
    if source.is_reward:
        _check_reward(source, kind, options)
    to = destination(source, kind, to)
    say_all(display, source.notes)
    makers: dict[Kind, Callable[..., object]] = {
        "adapter": _export_adapter,
        "merged": export_merged,
        "gguf": export_to_gguf,
        "gguf-adapter": export_to_gguf_adapter,
        "ollama": export_to_ollama,
    }
    makers[kind](source, to, options, display=display)
    display.say(f"{kind}: {to}")
    if kind == "adapter":
        _say_how_to_serve(to, source, display)
    return to


def _check_reward(source: Source, kind: Kind, options: Options) -> None:
    """Raise RunError for exports that are of language models."""
    what = f"{source.adapter} is a reward model: an adapter with a scalar head, which writes no text"
    if kind != "adapter":
        raise RunError(
            f"{what}, so --to {kind} makes nothing of it: --to adapter does, for transformers' sequence"
            " classification with PEFT"
        )
    if options.verify:
        raise RunError(f"{what}: there is nothing for --verify to compare. Its files are copied as they are")


def _export_adapter(source: Source, to: Path, options: Options, *, display: Display) -> None:
    def describe_it(part: Path) -> None:
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
            say_all(display, describe(report))
            judge(report, options, "nothing is kept of it")
        else:
            report = Report("adapter", "float32", not_compared="these are the adapter's own files")
        finish(part, source, report.as_dict(), "adapter", options)

    export_adapter(source, to, describe_it)


def _say_how_to_serve(folder: Path, source: Source, display: Display) -> None:
    """What servers will choke on, and the command lines that work; PEFT's Python is in the card."""
    if source.is_reward:
        display.say(f"\ntransformers and PEFT:\n{sequence_classifier(folder.resolve(), source.base)}")
        return
    say_all(display, [str(finding) for finding in lint(folder, source.base)])
    for server, line in commands(folder, source.base).items():
        if server != "PEFT":
            display.say(f"\n{server}:\n{line}")
    display.say(f"\nPEFT: the Python is in {folder / 'README.md'}")


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
        merged = to.with_name(f"{to.name}-merged")
        line = gguf_command(merged, to / name, options.dtype, None)
        raise not_found(MODELS, line, _lines_before(source, to, merged, options))

    def fill(part: Path) -> None:
        refuse_existing(to)
        merged = part / "merged"
        merged.mkdir(exist_ok=True)
        report = merge_and_prove(source, merged, options, display)
        made = _converted(merged, part / name, converter, options, display)
        say_all(display, made.describe())
        say_all(display, write_modelfile(part, merged, source=part / name).describe())
        finish(part, source, with_file(report, made, "gguf"), "gguf", options)
        shutil.rmtree(merged)

    refuse_existing(to)
    grow_folder(to, fill)
    return to / name


def _converted(merged: Path, file: Path, converter: Path, options: Options, display: Display) -> GgufExport:
    file.unlink(missing_ok=True)
    total = expected_bytes(merged, options.dtype) >> 20
    try:
        with display.counting("converting, MiB", total) as advance:
            return export_gguf(
                merged, file, options.dtype, converter, accept=options.accept, progress=advance
            )
    except ModelError as error:
        raise ModelError(
            f"{error}\nThe merged model waits in {merged}: the same command goes on with it, or delete"
            f" {merged.parent}"
        ) from error


def _lines_before(source: Source, to: Path, merged: Path, options: Options) -> list[str]:
    """What makes the merged folder that a converter is given by hand, and the folder for its file."""
    path = source.run.path if source.run else source.adapter
    words = ["lora-dpo", "export", str(path), "--to", "merged", "--dtype", options.dtype]
    words += ["--base", options.base] if options.base != "dequantized" else []
    if source.run is None:
        words += ["--base-model", source.base.model]
        words += ["--quantization", source.base.quantization] if source.record is None else []
    return [shlex.join([*words, "--output", str(merged)]), shlex.join(["mkdir", "-p", str(to)])]


def export_to_gguf_adapter(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Path:
    """A folder with the adapter as a GGUF file, for whoever serves it on a base of his own."""
    options, display = options or Options(), display or Display(quiet=True)
    name = f"{source.name}-adapter.gguf"
    converter = find_converter(options.llama_cpp, ADAPTERS)
    if converter is None:
        line = gguf_adapter_command(source.adapter, source.base, to / name, None)
        raise not_found(ADAPTERS, line, [shlex.join(["mkdir", "-p", str(to)])])

    def fill(part: Path) -> None:
        refuse_existing(to)
        made = export_gguf_adapter(
            source.adapter,
            source.base,
            part / name,
            converter,
            accept=options.accept,
        )
        say_all(display, made.describe())
        report = Report("gguf-adapter", "float32", not_compared="a GGUF file is not run here")
        finish(part, source, with_file(report, made, "gguf-adapter"), "gguf-adapter", options)

    refuse_existing(to)
    grow_folder(to, fill, fresh=True)
    return to / name


def export_to_ollama(
    source: Source, to: Path, options: Options | None = None, *, display: Display | None = None
) -> Report:
    """A merged model with a Modelfile that names it."""
    options, display = options or Options(), display or Display(quiet=True)
    made: list[Report] = []

    def fill(part: Path) -> None:
        refuse_existing(to)
        made.append(merge_and_prove(source, part, options, display))
        say_all(display, write_modelfile(part, part).describe())
        finish(part, source, made[0].as_dict() | {"kind": "ollama"}, "ollama", options)
        clear(part)

    refuse_existing(to)
    grow_folder(to, fill)
    return made[0]


def with_file(report: Report, made: Any, kind: Kind) -> dict[str, Any]:
    """The report of what was converted, with what the look at the converted file found."""
    facts = report.as_dict() | {"kind": kind}
    if made.check is None:
        return facts | {"file": {"checked": False}}
    found = list(made.check.findings)
    passed = False if found or report.passed is False else True if report.passed is None else report.passed
    failed = [*facts["failed"], *found]
    return facts | {"passed": passed, "failed": failed, "file": {"checked": True, "findings": found}}
