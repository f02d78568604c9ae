"""GGUF, for llama.cpp and what is built on it: llama.cpp's own converters, and a look at what they wrote.

A whole model is converted from a merged folder; an adapter from its folder in PEFT's layout, for whoever
serves it on a base of his own. There is no converter here: where llama.cpp's is missing, the commands
are said.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.gguf import adapter as gguf_adapter
from lora_dpo.export.gguf.check import Check, check_adapter, check_model
from lora_dpo.export.gguf.converter import (
    ADAPTERS,
    MODELS,
    Progress,
    command,
    not_found,
    part_of,
    run_converter,
)
from lora_dpo.export.gguf.tensors import headers
from lora_dpo.model import load_config
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base
from lora_dpo.run_directory import need_space

GgufDtype = Literal["float32", "float16", "bfloat16"]
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file, and what the look at it found.

    check: None where the `gguf` package is missing and nothing was looked at. base: in words, what an adapter
    has to be served on; None for a whole model.
    """

    file: Path
    check: Check | None
    base: str | None = None

    def describe(self) -> list[str]:
        """Lines for a person."""
        lines = [f"GGUF: {self.file.name} ({self.file.stat().st_size / 2**20:,.1f} MiB)"]
        if self.check is None:
            lines.append("not checked: that takes the gguf package (pip install 'lora-dpo[gguf]')")
        else:
            lines += self.check.describe()
        return lines + ([self.base] if self.base else [])


def export_gguf(
    merged: Path,
    to_file: Path,
    dtype: GgufDtype,
    converter: Path | None,
    *,
    python: str | None = None,
    progress: Progress | None = None,
    accept: bool = False,
) -> GgufExport:
    """Convert a merged model's folder and check the file; it appears by one rename, whole.

    converter: from `find_converter`. python: the interpreter it runs in, by default this one. accept: keep
    the file whatever the check finds. Raises ModelError without a converter, where it fails, or with what the
    check found; RunError where the file is there already or can't be written.
    """
    if converter is None:
        raise not_found(MODELS, gguf_command(merged, to_file, dtype, None))
    _need(merged / "config.json", merged, "a merged model")
    need_space(to_file.parent, expected_bytes(merged, dtype), "the GGUF file")

    def convert(part: Path) -> Check | None:
        arguments = [merged, "--outfile", part, "--outtype", OUTTYPES[dtype]]
        run_converter(converter, arguments, part, python=python, progress=progress)
        return check_model(part, merged)

    return GgufExport(to_file, _checked(to_file, convert, accept))


def gguf_command(merged: Path, to_file: Path, dtype: GgufDtype, converter: Path | None) -> str:
    """The command that converts by hand, quoted for a shell."""
    return command(converter, [merged, "--outfile", to_file, "--outtype", OUTTYPES[dtype]], MODELS)


def expected_bytes(merged: Path, dtype: GgufDtype) -> int:
    """About how large the file will be: the merged tensors in `dtype`. Raises ModelError."""
    counts = [entry.count for entry in headers(merged).values()]
    return sum(counts) * ITEM_BYTES[dtype]


def export_gguf_adapter(
    adapter: Path,
    base: Base,
    to_file: Path,
    converter: Path | None,
    *,
    python: str | None = None,
    progress: Progress | None = None,
    accept: bool = False,
) -> GgufExport:
    """Convert an adapter in PEFT's layout, its factors in float32, and check the file.

    base: whose architecture is read, not its weights. The rest is as in `export_gguf`.
    Raises ModelError for a kind of adapter that llama.cpp has no place for, with the alternative.
    """
    config = read_json(adapter / "adapter_config.json", "adapter")
    architecture, entries = load_config(base), headers(adapter, "adapter_model.safetensors")
    text = architecture.get_text_config()
    gguf_adapter.check_convertible(config, entries, bool(text.tie_word_embeddings), adapter)
    if converter is None:
        raise not_found(ADAPTERS, gguf_adapter_command(adapter, base, to_file, None))
    need_space(to_file.parent, 8 * sum(entry.count for entry in entries.values()), "the GGUF adapter")
    prepared = to_file.with_name(f".{to_file.name}.adapter.part")

    def convert(part: Path) -> Check | None:
        try:
            shutil.rmtree(prepared, ignore_errors=True)
            gguf_adapter.prepare(adapter, config, prepared)
            # Without what the checkpoint says of its quantization, on which the converter would stop.
            architecture.save_pretrained(str(prepared / "base"))
            arguments = ["--base", prepared / "base", "--outfile", part, "--outtype", "f32", prepared]
            run_converter(converter, arguments, part, python=python, progress=progress)
            return check_adapter(part, prepared, text)
        except SafetensorError as error:
            raise RunError(f"cannot write {prepared}: {error}") from error
        finally:
            shutil.rmtree(prepared, ignore_errors=True)

    return GgufExport(to_file, _checked(to_file, convert, accept), _served_on(base))


def gguf_adapter_command(adapter: Path, base: Base, to_file: Path, converter: Path | None) -> str:
    """The command that converts by hand, quoted for a shell.

    It doesn't heed rsLoRA's scale, nor an alpha of single modules: `export_gguf_adapter` does.
    """
    folder = Path(base.model).expanduser()
    where = ["--base", folder] if folder.is_dir() else ["--base-model-id", base.model]
    return command(converter, [*where, "--outfile", to_file, "--outtype", "f32", adapter], ADAPTERS)


def _served_on(base: Base) -> str:
    return (
        f"serve it on a GGUF of {base.model}: llama-server -m BASE.gguf --lora FILE. It was trained on that"
        f" base as it was quantized here ({base.quantization}); on one quantized otherwise it is another"
        " function (--to gguf merges it with the base that it was trained on)"
    )


def _need(file: Path, folder: Path, what: str) -> None:
    if not file.is_file():
        raise ModelError(f"{folder} holds no {what}: there is no {file.name} in it")


def _checked(to_file: Path, convert: Callable[[Path], Check | None], accept: bool) -> Check | None:
    """Fill the file, look at it, and let it stand only if nothing was found or `accept` says so."""
    with part_of(to_file) as part:
        check = convert(part)
        if check is not None and check.findings and not accept:
            found = "\n".join(f"  {finding}" for finding in check.findings)
            raise ModelError(
                f"the converter ended well, but the file is not the source's (--accept keeps it):\n{found}"
            )
    return check
