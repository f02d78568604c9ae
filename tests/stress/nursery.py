"""Runs of the command line that cost a second each: children forked from a process that imported everything.

The parent is a fresh process that has run nothing: no thread pool, no autograd, no accelerate state; a child
is what `lora-dpo …` would be after its imports. `Nursery` starts it and asks for children over a pipe, in
JSON lines. Each child is the leader of a process group, with its output in files and its flags in shared
memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parents[1])]  # for the scripts: tests' builders, and the package
SLOTS = (
    "inside",  # 1 in a checkpoint's writing, 2 in the deletion of an old one, 3 in that of adapter/
    "entered",  # how often one of them was begun
    "saved",  # the step of the newest checkpoint that was completed
    "paused",  # 1 while the child waits where it was asked to
    "go",  # set from outside: no more waiting
    "save_us",  # microseconds spent in each kind, and how often it ended
    "rotation_us",
    "finish_us",
    "saves",
    "rotations",
    "finishes",
    "step",  # of the last line in metrics.jsonl
    "operations",  # what the failing disk counted
)
TIMEOUT = 120.0


class Flags:
    """Whole numbers by name, shared with a child through a small file."""

    def __init__(self, file: Path):
        if not file.exists():
            file.write_bytes(bytes(8 * len(SLOTS)))
        with file.open("r+b") as content:
            self._map = mmap.mmap(content.fileno(), 8 * len(SLOTS))

    def __getitem__(self, name: str) -> int:
        at = 8 * SLOTS.index(name)
        return int.from_bytes(self._map[at : at + 8], "little")

    def __setitem__(self, name: str, value: int) -> None:
        at = 8 * SLOTS.index(name)
        self._map[at : at + 8] = value.to_bytes(8, "little")


@dataclass
class Child:
    """A run in a process of its own."""

    pid: int
    folder: Path
    flags: Flags
    _ask: Callable[[dict[str, Any]], Any]
    status: int | None = None

    def poll(self) -> int | None:
        """The exit status (minus the signal's number where one killed it), or None while it runs."""
        if self.status is None:
            self.status = self._ask({"poll": self.pid})
        return self.status

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit status. Raises TimeoutError, and kills, where it takes too long."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"child in {self.folder} still ran after {timeout} s\n{self.stderr}")
            time.sleep(0.002)
        assert self.status is not None
        return self.status

    def signal(self, number: int) -> None:
        # A child that ended stays a zombie until `poll` sees it, so that its number is still its own.
        if self.status is None:
            os.kill(self.pid, number)

    def reaches(self, condition: Callable[[Flags], bool], timeout: float = TIMEOUT) -> bool:
        """Whether its flags come to this before it ends."""
        until = time.monotonic() + timeout
        polls = 0
        while not condition(self.flags):
            polls += 1
            if polls % 50 == 0 and (self.poll() is not None or time.monotonic() > until):
                return False
            time.sleep(0.0002)
        return True

    def others(self) -> list[int]:
        """Living processes of its group, without itself."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                state, _, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
                if int(group) == self.pid and state != "Z" and int(entry.name) != self.pid:
                    found.append(int(entry.name))
        return found

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")


class Nursery:
    """Starts the parent process; `start` a child."""

    def __init__(self, *, preload: Path | None = None, prefix: Sequence[str] = ()):
        """preload: a shared library for LD_PRELOAD. prefix: words before the command, such as unshare's."""
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(
                [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
            ),
        }
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._count = 0

    def __enter__(self) -> Nursery:
        self._ask({"ready": True})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # it kills what still runs, and ends
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery ended")
        return json.loads(answer)

    def start(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        cache: Path,
        pause: str | None = None,
        at: int = 1,
        after: int = 0,
        blind: bool = False,
        fail: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """`lora-dpo WORDS` in a child that writes its stdout and stderr below `folder`.

        cache: its LORA_DPO_CACHE. pause: the phase in which it waits for the flag `go`, the `at`-th time that
        it comes there once the step `after` is done. fail: what the failing disk does (failing.py). blind: it
        does not look how much room there is.
        """
        self._count += 1
        own = folder / f"child-{self._count:04d}"
        own.mkdir(parents=True)
        flags = Flags(own / "flags")
        request = {
            "words": [str(word) for word in words],
            "folder": str(own),
            "pause": pause,
            "at": at,
            "after": after,
            "blind": blind,
            "fail": dict(fail) if fail else None,
            "environment": {"LORA_DPO_CACHE": str(cache), **(environment or {})},
        }
        return Child(self._ask(request), own, flags, self._ask)


def serve() -> None:
    """The parent: import, then fork a child for every request until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    import_everything()
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "ready" in request:
            answer: Any = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            living.discard(pid)
        else:
            answer = os.fork()
            if not answer:
                run_child(request)
            living.add(answer)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def import_everything() -> None:
    import torch

    torch.set_num_threads(1)
    import accelerate
    import bitsandbytes
    import datasets
    import inside  # noqa: F401
    import peft
    import transformers
    from peft.tuners.lora import bnb

    import lora_dpo.cli
    import lora_dpo.export
    import lora_dpo.finished
    import lora_dpo.rounds
    import lora_dpo.training  # noqa: F401

    for library in (accelerate, bitsandbytes, datasets, peft, transformers, bnb):
        assert library is not None
    # Loaded when they are first asked for.
    assert transformers.LlamaForCausalLM is not None
    assert transformers.AutoModelForCausalLM is not None
    assert transformers.AutoTokenizer is not None


def run_child(request: dict[str, Any]) -> None:
    """What the command line does, in a forked process; never returns."""
    os.setpgid(0, 0)
    folder = Path(request["folder"])
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(folder / name, mode, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(request["environment"])
    sys.argv = ["lora-dpo", *request["words"]]
    code = 1
    try:
        import inside

        from lora_dpo.cli import main

        inside.install(Flags(folder / "flags"), request)
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
