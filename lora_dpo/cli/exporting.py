"""`lora-dpo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_dpo.cli.app import app


@app.command("export")
def export_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run directory, or an adapter's folder.")
    ],
    to: Annotated[
        Literal["adapter", "merged", "gguf", "gguf-adapter", "ollama"], typer.Option(help="See above.")
    ],
    output: Annotated[Path | None, typer.Option(help="The new folder; RUN/export-KIND by default.")] = None,
    dtype: Annotated[str, typer.Option(help="What merged weights are stored in: bf16, fp16, fp32.")] = "bf16",
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option(
            help="Merge into the weights that were trained on, or into those of the base's files: another"
            " function, sometimes a better one; both are then compared."
        ),
    ] = "dequantized",
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 2GB or 500MB.")] = "4GB",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Reload what was made and compare it with base + adapter. By default a merged model is.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to compare on instead of the held-out ones.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    accept: Annotated[bool, typer.Option("--accept", help="Take what misses the bars.")] = False,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's folder; else $LLAMA_CPP, else the PATH.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's folder or hub id, where it is not the one that was named.")
    ] = None,
    quantization: Annotated[
        Literal["nf4", "fp4", "int8", "none"] | None,
        typer.Option(help="How the base of an adapter made elsewhere was quantized; none by default."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to the hub, privately.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")] = False,
) -> None:
    """Export a run, or an adapter's folder, and prove what it kept.

    adapter: PEFT's layout, for PEFT, vLLM and others. merged: one plain transformers model. gguf: the merged
    model for llama.cpp, by llama.cpp's own converter. gguf-adapter: the adapter alone for llama.cpp.
    ollama: a merged model with a Modelfile.

    A merged model is the function that was trained: the update is added to the weights that were trained on,
    in float32. It is reloaded and compared with base + adapter on held-out rows; where too little of the
    margin, of the distributions or of the update is left, nothing is exported, unless --accept says so. The
    figures are in export_report.json and in the model card.
    """
    from lora_dpo.export import Options, export, find_source

    options = Options(
        dtype=_dtype(dtype),  # pyright: ignore[reportArgumentType]
        base=base,
        shard_size=_bytes(shard_size),
        verify=verify,
        data=data,
        examples=examples,
        accept=accept,
        llama_cpp=llama_cpp.expanduser() if llama_cpp else None,
        repository=push,
    )
    from lora_dpo.export.push import check_push
    from lora_dpo.export.push import push as push_folder
    from lora_dpo.training import Display

    if push is not None:
        check_push(push)
    display = Display()
    found = find_source(source.expanduser(), base_model=base_model, quantization=quantization)
    folder = export(found, to, output.expanduser() if output else None, options, display=display)
    if push is not None:
        display.say(f"pushed: {push_folder(folder, push, public=public, display=display)}")


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype(text: str) -> str:
    from lora_dpo.errors import RecipeError

    found = DTYPES.get(text, text)
    if found not in DTYPES.values():
        raise RecipeError(f"--dtype got {text!r}; it takes bf16, fp16 or fp32")
    return found


def _bytes(text: str) -> int:
    """Bytes out of "4GB", "500 MB", "4000000000"."""
    import re

    from lora_dpo.errors import RecipeError

    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--shard-size got {text!r}; it takes a size such as 2GB or 500MB")
    unit = 1024 if found[3] else 1000
    return max(1, int(float(found[1]) * unit ** " KMGT".index(found[2].upper() or " ")))
