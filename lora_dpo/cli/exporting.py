"""`lora-dpo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_dpo.cli.app import app

Kind = Literal["adapter", "merged", "gguf", "gguf-adapter", "ollama"]

Source = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run directory, or an adapter's folder.")
]
To = Annotated[Kind, typer.Option(help="See above.")]
Output = Annotated[
    str | None, typer.Option(metavar="PATH", help="The new folder; RUN/export-KIND by default.")
]
Dtype = Annotated[str, typer.Option(help="What merged weights are stored in: bf16, fp16, fp32.")]
BaseWeights = Annotated[
    Literal["dequantized", "original"],
    typer.Option(
        help="Merge into the weights that were trained on, or into those of the base's files: another"
        " function, sometimes a better one; both are then compared."
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest file of weights, such as 2GB or 500MB.")]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Reload what was made and compare it with base + adapter. By default a merged model is.",
        show_default=False,
    ),
]
Rows = Annotated[str | None, typer.Option(help="Rows to compare on instead of the held-out ones.")]
Examples = Annotated[int, typer.Option(min=1, help="How many of them.")]
Accept = Annotated[bool, typer.Option("--accept", help="Take what misses the bars.")]
LlamaCpp = Annotated[Path | None, typer.Option(help="llama.cpp's folder; else $LLAMA_CPP, else the PATH.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base's folder or hub id, where it is not the one that was named.")
]
Quantization = Annotated[
    Literal["nf4", "fp4", "int8", "none"] | None,
    typer.Option(help="How the base of an adapter made elsewhere was quantized; none by default."),
]
Push = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it to the hub, privately.")]
Public = Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")]


@app.command("export")
def export_command(
    context: typer.Context,
    source: Source,
    to: To,
    output: Output = None,
    dtype: Dtype = "bf16",
    base: BaseWeights = "dequantized",
    shard_size: ShardSize = "4GB",
    verify: Verify = None,
    data: Rows = None,
    examples: Examples = 64,
    accept: Accept = False,
    llama_cpp: LlamaCpp = None,
    base_model: BaseModel = None,
    quantization: Quantization = None,
    push: Push = None,
    public: Public = False,
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
    _refuse_without_effect(_given(context), to, verify)
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
    place = None if output is None else _path(output, "--output")
    found = find_source(_path(source, "RUN_OR_ADAPTER"), base_model=base_model, quantization=quantization)
    folder = export(found, to, place, options, display=display)
    if push is not None:
        display.say(f"pushed: {push_folder(folder, push, public=public, display=display)}")


MERGED: tuple[Kind, ...] = ("merged", "gguf", "ollama")
"""Kinds for which weights are merged."""

TAKEN_BY: dict[str, tuple[Kind, ...]] = {
    "--dtype": MERGED,
    "--base": MERGED,
    "--shard-size": ("merged", "ollama"),
    "--llama-cpp": ("gguf", "gguf-adapter"),
    "--no-verify": ("adapter", *MERGED),
    "--verify": ("adapter", *MERGED),
    "--data": ("adapter", *MERGED),
    "--examples": ("adapter", *MERGED),
    "--accept": ("adapter", "gguf-adapter", *MERGED),
}
"""Options that mean something for some kinds only."""

OF_THE_COMPARISON = ("--data", "--examples")


def _given(context: typer.Context) -> dict[str, Any]:
    """The options that were typed, by their names."""
    given = {}
    for name, value in context.params.items():
        found = context.get_parameter_source(name)
        if found is None or found.name == "DEFAULT":
            continue
        option = "--no-verify" if (name, value) == ("verify", False) else "--" + name.replace("_", "-")
        given[option] = value
    return given


def _refuse_without_effect(given: dict[str, Any], kind: Kind, verify: bool | None) -> None:
    """Raise RecipeError for an option that would change nothing: whoever gives it expects something."""
    from lora_dpo.errors import RecipeError

    for option in given:
        if kind not in TAKEN_BY.get(option, (kind,)):
            kinds = ", ".join(TAKEN_BY[option])
            raise RecipeError(f"{option} has no effect with --to {kind} (it has with {kinds}): leave it out")
        if option in OF_THE_COMPARISON and verify is False:
            raise RecipeError(
                f"{option} has no effect with --no-verify, which compares nothing: leave one out"
            )
        if kind == "adapter" and not verify and option in (*OF_THE_COMPARISON, "--accept"):
            raise RecipeError(
                f"{option} has no effect with --to adapter unless --verify is given: an adapter is copied as"
                " it is, and not compared"
            )
    if given.get("--public") and "--push" not in given:
        raise RecipeError("--public has no effect without --push USER/NAME: leave it out")


def _path(text: str, what: str) -> Path:
    from lora_dpo.errors import RecipeError

    if not text.strip():
        raise RecipeError(f"{what} got {text!r}; it takes a folder")
    return Path(text).expanduser()


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
