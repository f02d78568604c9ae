"""llama.cpp's converters, where the user has them: found, run as a process of their own, watched.

They are scripts of llama.cpp's repository, in no package. None of their code is imported here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lora_dpo.errors import ModelError, RunError
from lora_dpo.run_directory.writing import sync

MODELS, ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
"""The scripts: one for whole models, one for adapters in PEFT's layout."""

VARIABLE = "LLAMA_CPP"
"""Environment variable that names llama.cpp's folder where the command line doesn't."""

SOURCE = "https://github.com/ggml-org/llama.cpp"

Progress = Callable[[int], None]
"""Called with how many more MiB were written."""

_POLL_SECONDS = 0.2
_LAST_LINES = 12
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

# Ends the converter when whoever started it is gone, even by SIGKILL: its end of the pipe closes then.
_LAUNCHER = """
import os, runpy, sys, threading
def end_with_the_pipe():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_the_pipe, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_converter(llama_cpp: Path | None, name: str) -> Path | None:
    """One of llama.cpp's scripts: in the folder given, else in the one $LLAMA_CPP names, else on the PATH.

    llama_cpp: a checkout, or any folder in which the script lies, or a script in it. None: it was found
    nowhere. Raises RunError where a folder is named and the script isn't in it.
    """
    named = os.environ.get(VARIABLE)
    if llama_cpp is not None:
        return _in_folder(llama_cpp, name, "--llama-cpp")
    if named:
        return _in_folder(Path(named), name, f"${VARIABLE}")
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def _in_folder(given: Path, name: str, key: str) -> Path:
    folder = given.expanduser()
    folder = folder.parent if folder.is_file() else folder
    if not folder.is_dir():
        raise RunError(f"{key} got {str(given)!r}: there is no such folder; it takes a checkout of {SOURCE}")
    if not (folder / name).is_file():
        raise RunError(f"{key}: {name} is not in {folder}; it lies at the top of a checkout of {SOURCE}")
    return folder.absolute() / name


def command(script: Path | None, arguments: Sequence[str | Path], name: str) -> str:
    """What does the same by hand, quoted for a shell. script: None where it still has to be fetched."""
    place = script or Path("llama.cpp") / name
    return shlex.join(["python", str(place), *map(str, arguments)])


def not_found(name: str, line: str, before: Sequence[str] = ()) -> ModelError:
    """The error where there is no converter: what to fetch, and what to type then. before: lines that make
    what `line` converts.
    """
    made = "".join(f"  {earlier}\n" for earlier in before)
    return ModelError(
        f"llama.cpp's {name} was not found (--llama-cpp DIR, ${VARIABLE} or the PATH name it): nothing was"
        " converted. It comes with llama.cpp:\n"
        f"  git clone --depth 1 {SOURCE}\n"
        "  pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt\n"
        f"{made}  {line}\n"
        "The second line may bring another torch and transformers: give it an environment of its own"
    )


@contextmanager
def part_of(to_file: Path) -> Iterator[Path]:
    """A file to fill beside its place; it is put there by one rename, if nothing was raised.

    Whatever is raised, nothing is left of it. Raises RunError where something is there already, or the
    system refuses to write.
    """
    if to_file.exists():
        raise RunError(f"{to_file} is there already: choose another with --output")
    # The converter fills {braces} of a name in: this one has none, whatever the user's name is.
    part = to_file.with_name(f".{re.sub(r'[{}]', '_', to_file.name)}.part")
    try:
        to_file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        yield part
        sync(part)
        os.replace(part, to_file)
        sync(to_file.parent)
    except OSError as error:
        raise RunError(f"cannot write {to_file}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def run_converter(
    script: Path,
    arguments: Sequence[str | Path],
    out: Path,
    *,
    python: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Run a converter that writes the file `out`; it ends when this process does, however that ends.

    python: the interpreter, by default this one. Its output is shown only where it fails: ModelError then
    has the last lines, and what mends it where that is known.
    """
    line = [python or sys.executable, "-c", _LAUNCHER, str(script), *map(str, arguments)]
    # All that it reads lies here: it has nothing to ask the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            raise ModelError(f"{script.name} cannot be started with {line[0]}: {error}") from error
        try:
            _wait(process, out, progress)
        finally:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
        if process.returncode != 0 or not out.is_file():
            raise ModelError(_failure(script.name, line[0], process.returncode, _last_lines(output)))


def _wait(process: subprocess.Popen[bytes], out: Path, progress: Progress | None) -> None:
    told = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
        written = out.stat().st_size >> 20 if out.is_file() else 0
        if progress is not None and written > told:
            progress(written - told)
            told = written
        if process.returncode is not None:
            return


def _last_lines(output: IO[bytes]) -> list[str]:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 2**14))
    # A progress bar writes over its line.
    lines = re.split(r"[\r\n]+", output.read().decode("utf-8", "replace"))
    shown = (_printable(line).rstrip() for line in lines)
    return [line for line in shown if line.strip()][-_LAST_LINES:]


def _printable(line: str) -> str:
    """A line that can't command the terminal: without colours, other control characters escaped."""
    line = _COLOURS.sub("", line).replace("\t", "    ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _failure(name: str, python: str, status: int, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    ended = f"{name} failed (status {status})" if status else f"{name} ended with status 0 but wrote no file"
    if not lines:
        return f"{ended}, and printed nothing"
    missing = re.search(r"No module named '([\w.]+)'", text)
    advice = ""
    if missing:
        advice = f"\n{python} lacks {missing[1]}: {shlex.quote(python)} -m pip install {missing[1]}"
    elif "pre-tokenizer was not recognized" in text:
        advice = (
            "\nllama.cpp knows tokenizers by a fingerprint, and this one's isn't among them: one made from"
            " scratch, a model newer than this llama.cpp, or tokens that were added. A newer one may know"
            " it; otherwise its get_vocab_base_pre() needs a line for it (see convert_hf_to_gguf_update.py)"
        )
    elif "not supported" in text:
        advice = "\nThis llama.cpp doesn't convert the architecture; a newer one may"
    elif "tokenizer.model" in text:
        advice = (
            "\nThe converter wants this architecture's SentencePiece file, which transformers writes no more:"
            " copy tokenizer.model from the base's own folder beside the model's tokenizer.json"
        )
    elif "KeyError" in text:
        advice = (
            f"\nThe converter misses a key that {python}'s transformers has no more, or never had: give it"
            " an interpreter with the versions in llama.cpp's requirements"
        )
    elif "No space left" in text:
        advice = "\nThe disk is full: make room, or name a file on another one with --output"
    return f"{ended}; its last lines:\n{text}{advice}"
