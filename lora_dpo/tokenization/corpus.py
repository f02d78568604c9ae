"""A whole data set through the tokenizer, with a count of what had to be dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_dpo.errors import DataError
from lora_dpo.tokenization.cache import TokenCache
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.outcomes import Tokenized, outcome
from lora_dpo.tokenization.portable import corpus_key
from lora_dpo.tokenization.processes import can_start, usable_processes, working
from lora_dpo.tokenization.work_queue import Record, WorkQueue

MEASURE_SECONDS = 1.0
"""How long the rate is measured before a decision about worker processes."""
WORTH_SECONDS = 10.0
"""Workers are started if this process alone would take longer than this for the rest. A worker takes some
three seconds of a CPU until its first record: on two CPUs, ten seconds become seven."""
CHUNK_SECONDS = 0.25
_FIRST_CHUNK = 16
_LARGEST_CHUNK = 512


def tokenize(
    records: Iterable[Record],
    tokenizer: ChatTokenizer,
    progress: Callable[[int], None] | None = None,
    *,
    skip_refused: bool = False,
    workers: int | None = 1,
    cache: Path | None = None,
) -> Tokenized:
    """Tokenize every record; `progress` hears how many more are done.

    workers: how many processes may share a long job, this one included; None takes one for each CPU. cache:
    a folder; what was tokenized before is read from there, and what is new is kept there.
    Raises DataError if none is left, or (unless `skip_refused`, which counts it as dropped) the template
    refuses one; ModelError if the tokenizer is of no use. Neither depends on `workers` or `cache`; but a
    worker that is killed from outside is a DataError too.
    """
    records = list(records)
    key = corpus_key(records, tokenizer, skip_refused) if cache is not None else None
    if cache is None or key is None:
        return _tokenize(records, tokenizer, progress, skip_refused, workers)
    store = TokenCache(cache)
    tokenized = store.read(key)
    if tokenized is None:
        with store.alone(key):
            tokenized = store.read(key)  # another process may just have done it
            if tokenized is None:
                done = _tokenize(records, tokenizer, progress, skip_refused, workers)
                store.write(key, done)
                return done
    if progress is not None:
        progress(len(records))
    return tokenized


def _tokenize(
    records: Sequence[Record],
    tokenizer: ChatTokenizer,
    progress: Callable[[int], None] | None,
    skip_refused: bool,
    workers: int | None,
) -> Tokenized:
    queue = WorkQueue(records, _FIRST_CHUNK, progress)
    others = (usable_processes() if workers is None else workers) - 1
    began = time.monotonic()
    with ExitStack() as stack:
        while places := queue.next_here():
            work(queue, places, tokenizer, skip_refused)
            seconds = time.monotonic() - began
            if others > 0 and seconds >= MEASURE_SECONDS:
                rate = (len(records) - queue.left) / seconds
                queue.chunk = max(1, min(_LARGEST_CHUNK, round(rate * CHUNK_SECONDS)))
                if queue.left / rate > WORTH_SECONDS and can_start():
                    stack.enter_context(working(queue, tokenizer, skip_refused, others))
                others = 0  # decided, either way
    return _not_empty(queue.result())


def _not_empty(tokenized: Tokenized) -> Tokenized:
    if not tokenized.branches:
        reasons = tokenized.describe_dropped() or "there are no rows"
        raise DataError(f"no row is left after tokenization: {reasons}; data.max_tokens may be too small")
    return tokenized


def work(queue: WorkQueue, places: range, tokenizer: ChatTokenizer, skip_refused: bool) -> None:
    """Do these records of the queue in this process. The first that raises ends it."""
    for place in places:
        try:
            queue.done_here(place, outcome(queue.records[place], tokenizer, skip_refused))
        except Exception as error:
            queue.failed(place, error)
            return
