"""The commands. Heavy imports stand inside the functions, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

if TYPE_CHECKING:
    from lora_dpo.finished import Sample
    from lora_dpo.recipe import Recipe
    from lora_dpo.training import Display

app = typer.Typer(
    name="lora-dpo",
    help="Align a language model with preferences: DPO with LoRA adapters on one 4-bit base.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
TAKES_KEYS = {"allow_extra_args": True}
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]


def main() -> None:
    """The `lora-dpo` command."""
    with friendly_errors():
        app()


@app.callback()
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from lora_dpo import __version__

        print(__version__)
        raise typer.Exit


@app.command("train", context_settings=TAKES_KEYS)
def train_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a .py or a .yaml file.")],
    resume: Annotated[bool, typer.Option(help="Go on with the run in the recipe's run directory.")] = False,
    accept: Annotated[
        str, typer.Option(metavar="WHAT,…", help="With --resume: what is meant to differ; see below.")
    ] = "",
) -> None:
    """Train a recipe.

    Keys of the recipe can follow it: lora-dpo train RECIPE loss.beta=0.05 training.epochs=2. An unknown
    key names the nearest known one; `python RECIPE.py --help` lists them all.

    A run that was stopped or killed goes on with --resume. Where the recipe, the data, the base or the
    reference are not those that it began with it is refused, unless --accept names what is meant: data, base,
    reference, or keys of the recipe such as training.epochs.
    """
    from lora_dpo.recipe import load_recipe

    _train(load_recipe(recipe, context.args), resume, _names(accept))


@app.command("eval")
def eval_command(
    run: RunFolder,
    data: Annotated[str | None, typer.Option(help="Held-out rows instead of the recipe's own.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many prompts to answer, base and policy.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Evaluate a run on held-out pairs.

    Accuracy and margin with 95% bootstrap intervals, log-prob changes, and answers of base and policy side
    by side.
    """
    from lora_dpo.finished import evaluate_run, open_finished, side_by_side
    from lora_dpo.training import Display

    display = Display()
    finished = open_finished(run, data=data, display=display)
    result = evaluate_run(finished, display=display)
    display.say(f"\n{result.examples} held-out examples, mean with 95% bootstrap interval")
    for name, interval in result.metrics.items():
        display.say(f"  {name:<24} {interval}")
    display.say(f"written to {finished.directory.evaluation_file}")
    if samples:
        made = side_by_side(finished, count=samples, max_new_tokens=max_new_tokens, display=display)
        _show_samples(display, made)
        display.say(f"{len(made)} answers side by side: {finished.directory.samples_file}")


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


def _show_samples(display: Display, samples: Sequence[Sample]) -> None:
    for sample in samples[:4]:
        display.say(f"\nprompt  {_short(sample.prompt)}")
        display.say(f"base    {_short(sample.base)}")
        if sample.reference is not None:
            display.say(f"ref     {_short(sample.reference)}")
        display.say(f"policy  {_short(sample.policy)}")
    if samples:
        base, policy = (sum(len(t.split()) for t in texts) / len(samples) for texts in _answers(samples))
        display.say(f"\nwords an answer: base {base:.1f}, policy {policy:.1f}")


def _answers(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [sample.base for sample in samples], [sample.policy for sample in samples]


def _short(text: str, width: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def run(
    recipe: Recipe, arguments: Sequence[str] | None = None, *, job: Callable[..., object] | None = None
) -> None:
    """What a recipe script ends with: `python recipes/NAME.py key=value … [--resume [--accept WHAT,…]]`.

    job(recipe, resume=…, accept=…) is what is done; training, unless something else is given. Prints errors
    without a traceback and exits with the status the command line would.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with friendly_errors():
        from lora_dpo.recipe import override

        if "-h" in words or "--help" in words:
            print(recipe_help(recipe))
            return
        accept = _taken(words, "--accept")
        resume = "--resume" in words
        recipe = override(recipe, [word for word in words if word != "--resume"])
        if job is None:
            _train(recipe, resume, accept)
        else:
            _until_stopped(job, recipe, resume, accept)


def _taken(words: list[str], option: str) -> list[str]:
    """Takes `--option a,b` or `--option=a,b` out of the words; returns its names."""
    from lora_dpo.errors import RecipeError

    names: list[str] = []
    for place, word in reversed(list(enumerate(words))):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if not equals and (place + 1 == len(words) or words[place + 1].startswith("--")):
            raise RecipeError(f"{option} takes what is meant to differ, such as data or loss.beta")
        value = value if equals else words.pop(place + 1)
        del words[place]
        names += _names(value)
    return names


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def recipe_help(recipe: Recipe) -> str:
    """Every key of a recipe with its value and what it takes."""
    from lora_dpo.recipe import keys_of

    script = Path(sys.argv[0]).name
    lines = [
        f"usage: python {script} [key=value ...] [--resume [--accept WHAT,...]]",
        "",
        "--resume goes on with a run that was stopped or killed. --accept names what is meant to differ from",
        "the run that began: data, base, reference, or keys such as training.epochs.",
        "",
        "keys, their values here, what they take:",
    ]
    lines += [f"  {key}={value}    ({takes})" for key, takes, value in keys_of(recipe)]
    return "\n".join(lines)


def _train(recipe: Recipe, resume: bool, accept: Sequence[str]) -> None:
    from lora_dpo.training import train

    directory = _until_stopped(train, recipe, resume, accept)
    if os.environ.get("RANK", "0") == "0":
        _last_words(f"evaluate: lora-dpo eval {directory.path}", sys.stdout)
        _last_words(f"export:   lora-dpo export {directory.path} --to merged", sys.stdout)


def _until_stopped(job: Callable[..., Any], recipe: Recipe, resume: bool, accept: Sequence[str]) -> Any:
    """The job's result; a run that was asked to stop says how to go on and exits with the signal's status."""
    from lora_dpo.training import Stopped

    try:
        return job(recipe, resume=resume, accept=accept)
    except Stopped as stopped:
        _last_words(str(stopped))
        raise SystemExit(stopped.code) from None


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """A `UserError` becomes one line and exit status 2; Ctrl-C becomes 130, SIGTERM 143 and SIGHUP 129."""
    from lora_dpo.errors import UserError
    from lora_dpo.stopping import Interrupted, Stops

    stops = Stops()
    try:
        with stops.listening():
            yield
    except UserError as error:
        _last_words(f"error: {error}")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit) as end:
        # typer makes every KeyboardInterrupt a silent exit 130; a run that stopped has spoken itself.
        if isinstance(end, SystemExit) and stops.asked is None:
            raise
        _last_words("stopped; nothing half-written is in its place, the same command goes on or begins again")
        code = end.code if isinstance(end, Interrupted) else 128 + (stops.asked or 2)
        raise SystemExit(code) from None


def _last_words(text: str, stream: TextIO | None = None) -> None:
    """To the terminal, if there is still one."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stderr, flush=True)


if __name__ == "__main__":
    main()
