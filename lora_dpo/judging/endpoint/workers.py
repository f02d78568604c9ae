"""Many jobs on a few threads, so that the first error, or Ctrl-C, ends them all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

LOOK_SECONDS = 0.2
"""The main thread wakes up so often: a signal is answered only while it runs Python."""


def run_all(
    jobs: Sequence[Job],
    work: Callable[[Job, threading.Event], Result],
    *,
    threads: int,
    done: Callable[[int], None] = lambda n: None,
) -> list[Result]:
    """work(job, stop) of every job, in the order of the jobs. `done` is told, here, the number of each.

    stop: set when the rest is not wanted any more; who waits should look at it. Whatever the first failing
    job raises is raised here, and no further job begins.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    made: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()
    for n in range(len(jobs)):
        todo.put(n)

    def worker() -> None:
        while not stop.is_set():
            try:
                n = todo.get_nowait()
            except queue.Empty:
                return
            try:
                made.put((n, work(jobs[n], stop), None))
            except BaseException as error:
                stop.set()
                made.put((n, None, error))

    results: dict[int, Result] = {}
    try:
        # Daemons: one that waits for a slow answer does not keep the program from ending.
        for _ in range(min(threads, len(jobs))):
            threading.Thread(target=worker, daemon=True).start()
        while len(results) < len(jobs):
            try:
                n, result, error = made.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[n] = result
            done(n)
    finally:
        stop.set()
    return [results[n] for n in range(len(jobs))]
