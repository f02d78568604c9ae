"""The records on the queue: which chunk is whose to do, what became of each, which error comes first.

Chunks are handed out in the records' order, so when one fails every earlier one is in somebody's hands: the
error that is raised is the one that a single process would have met.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from lora_dpo.preferences import AnyRecord
from lora_dpo.tokenization.outcomes import Outcome, Tokenized

Record = AnyRecord


class WorkQueue:
    """Shared by the process's own loop (`next_here`) and the threads that serve workers (`next_there`).

    chunk: how many records are handed out at a time. progress hears of what is done, in the thread that calls
    `next_here` only.
    """

    def __init__(self, records: Sequence[Record], chunk: int, progress: Callable[[int], None] | None) -> None:
        self.records, self.chunk = records, chunk
        self._outcomes: list[Outcome | None] = [None] * len(records)
        self._errors: dict[int, BaseException] = {}
        self._claimed = self._unreported = 0
        self._there: set[int] = set()
        self._returned: list[range] = []
        self._change = threading.Condition()
        self._progress = progress

    @property
    def left(self) -> int:
        """Records that nobody has taken yet."""
        return len(self.records) - self._claimed

    def next_here(self) -> range | None:
        """The next places to do in this thread, or None when all that matters is done. Waits for workers."""
        with self._change:
            while True:
                self.report()
                limit = min(self._errors, default=len(self.records))
                self._returned = [places for places in self._returned if places.start < limit]
                if self._returned:
                    return self._returned.pop()
                if self.left and not self._errors:
                    return self._claim()
                if not any(start < limit for start in self._there):
                    return None
                self._change.wait(0.5)

    def next_there(self) -> range | None:
        """The next places for a worker, or None if there are none left."""
        with self._change:
            if not self.left or self._errors:
                return None
            places = self._claim()
            self._there.add(places.start)
            return places

    def done_here(self, place: int, outcome: Outcome) -> None:
        self._outcomes[place] = outcome
        if self._progress is not None:
            self._progress(1)

    def done_there(self, places: range, outcomes: Sequence[Outcome]) -> None:
        """A worker's answer; the places that it has no outcome for are done here."""
        with self._change:
            self._outcomes[places.start : places.start + len(outcomes)] = outcomes
            self._unreported += len(outcomes)
            if len(outcomes) < len(places):
                self._returned.append(places[len(outcomes) :])
            self._there.discard(places.start)
            self._change.notify_all()

    def failed(self, place: int, error: BaseException) -> None:
        with self._change:
            self._errors[place] = error
            self._there.discard(place)
            self._change.notify_all()

    def report(self) -> None:
        """Tell `progress` what workers have done since the last time."""
        more, self._unreported = self._unreported, 0
        if more and self._progress is not None:
            self._progress(more)

    def result(self) -> Tokenized:
        """What all records became. Raises the first error in their order."""
        if self._errors:
            raise self._errors[min(self._errors)]
        tokenized = Tokenized([], Counter(), {})
        for record, outcome in zip(self.records, self._outcomes, strict=True):
            assert outcome is not None
            tokenized.add(record, outcome)
        return tokenized

    def _claim(self) -> range:
        start = self._claimed
        self._claimed = min(start + self.chunk, len(self.records))
        return range(start, self._claimed)
