"""Worker processes from the asking side.

Each is a fresh interpreter that runs `worker`, with pipes to a thread here. It isn't a fork, which is unsafe
where threads and CUDA live, and not `multiprocessing`, which imports the main script again: a script without
`if __name__ == "__main__"`, or a notebook, works like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from lora_dpo.errors import DataError
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.flat import from_bytes
from lora_dpo.tokenization.outcomes import Outcome
from lora_dpo.tokenization.portable import record_text, settings_digest
from lora_dpo.tokenization.work_queue import Record, WorkQueue
from lora_dpo.tokenization.worker import read_frame, write_frame

MOST_PROCESSES = 8
"""An automatic choice takes no more, this process included: each holds the libraries, some 400 MB."""

_CODE = "import sys; sys.path[:] = {!r}; from lora_dpo.tokenization.worker import main; main()"

# One thread each, no accelerator, and no network: a worker gets all that it needs through its pipe.
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def usable_processes() -> int:
    """How many processes tokenize if nobody says: one for each CPU that this process may use, capped."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cpus, MOST_PROCESSES)


def can_start() -> bool:
    """Whether `sys.executable` is a Python: in a frozen application it would be the application again."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class WorkerProcess:
    """One worker process. `stop` it."""

    def __init__(self) -> None:
        # In a session of its own Ctrl-C doesn't reach it: this process hears of it, and ends it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT,
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def prepare(self, tokenizer: ChatTokenizer, skip_refused: bool) -> bool:
        """Make the worker's copy of the tokenizer; whether it is one, and the process lives."""
        settings = tokenizer.settings()
        request = {"settings": settings, "skip_refused": skip_refused}
        try:
            return settings is not None and self._ask(request) == settings_digest(settings).encode()
        except (OSError, EOFError, ValueError):
            return False

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """Of the records in their order, up to the first that raises or can't be sent. Raises DataError if
        the process has ended.
        """
        texts: list[str] = []
        for record in records:
            text = record_text(record)
            if text is None:
                break
            texts.append(text)
        try:
            branches, facts = from_bytes(self._ask({"records": texts}))
        except (OSError, EOFError, ValueError) as error:
            raise DataError(self._obituary()) from error
        kept = iter(branches)
        return [next(kept) if reason is None else reason for reason in facts["outcomes"]]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for pipe in self._pipes():
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, request: object) -> bytes:
        requests, answers = self._pipes()
        write_frame(requests, json.dumps(request).encode())
        return read_frame(answers)

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def _obituary(self) -> str:
        code = self.process.wait()
        how = f"with status {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"by {signal.Signals(-code).name}"
        reason = "; the system may have run out of memory" if code == -9 else ""
        return f"a process that was tokenizing was ended {how}{reason}. data.workers=1 does without others"


@contextlib.contextmanager
def working(queue: WorkQueue, tokenizer: ChatTokenizer, skip_refused: bool, count: int) -> Iterator[None]:
    """`count` workers take from the queue for the while. However it ends, none of them lives on.

    One that can't start, or doesn't come to the same tokenizer, takes nothing.
    """
    workers: list[WorkerProcess] = []
    threads: list[threading.Thread] = []
    try:
        with contextlib.suppress(OSError):
            for _ in range(count):
                workers.append(WorkerProcess())
        for worker in workers:
            arguments = (worker, queue, tokenizer, skip_refused)
            threads.append(threading.Thread(target=serve, args=arguments, daemon=True))
            threads[-1].start()
        yield
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


def serve(worker: WorkerProcess, queue: WorkQueue, tokenizer: ChatTokenizer, skip_refused: bool) -> None:
    """Do chunks of the queue in a worker until there are none left, or it fails."""
    if not worker.prepare(tokenizer, skip_refused):
        return
    while places := queue.next_there():
        try:
            outcomes = worker.outcomes(queue.records[places.start : places.stop])
        except BaseException as error:  # a thread has nobody to raise to
            queue.failed(places.start, error)
            return
        queue.done_there(places, outcomes)
