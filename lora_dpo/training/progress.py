"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dpo.training.observers import Record

LINE_SECONDS = 10.0
"""Away from a terminal, at most one line of progress in this many seconds."""


_CLOSED = (OSError, ValueError, RuntimeError)
"""What a stream may raise; the last where a signal's handler writes while it is being written to."""


class _Outlived:
    """A stream that a run may outlive: the terminal was closed, or the program behind the pipe ended."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(*_CLOSED):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*_CLOSED):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """Prints what happens; `observe` is an observer. Quiet on all processes but the main one.

    Nothing that goes wrong with the terminal reaches the run.
    """

    def __init__(self, quiet: bool = False):
        stream = cast(IO[str], _Outlived(sys.stdout))
        self.console = Console(file=stream, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self.live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._last_line = -LINE_SECONDS

    @property
    def quiet(self) -> bool:
        return self.console.quiet

    @quiet.setter
    def quiet(self, value: bool) -> None:
        self.console.quiet = value
        self.live = self.console.is_terminal and not value

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    @contextmanager
    def training(self, done: int, steps: int) -> Iterator[None]:
        """Shows the bar of the training loop for the while."""
        with self._progress("training", done, steps):
            yield

    def observe(self, record: Record) -> None:
        text = describe(record)
        if record.kind != "step":
            self.say(f"step {record.step}: {text}")
        elif self._bar is not None and self.live:
            self._bar.update(self._bar.task_ids[0], completed=record.step, facts=text)
        elif self._due(last=record.step in (1, record.steps)):
            self.say(f"step {record.step}/{record.steps}  {text}")

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for long work that counts: yields a function to call with how many more are done."""
        done = 0

        def advance(more: int = 1) -> None:
            nonlocal done
            done += more
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif self._due():
                self.say(f"{what}: {done}/{total}")

        self._last_line = time.monotonic()
        with self._progress(what, 0, total) as bar:
            yield advance

    @contextmanager
    def _progress(self, what: str, done: int, total: int) -> Iterator[Progress | None]:
        if not self.live:
            yield None
            return
        columns = [TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()]
        ending = [TextColumn("{task.fields[facts]}"), TimeRemainingColumn(compact=True)]
        with Progress(*columns, *ending, console=self.console, transient=True) as bar:
            bar.add_task(what, total=total, completed=done, facts="")
            outer, self._bar = self._bar, bar
            try:
                yield bar
            finally:
                self._bar = outer

    def _due(self, last: bool = False) -> bool:
        now = time.monotonic()
        if not last and now - self._last_line < LINE_SECONDS:
            return False
        self._last_line = now
        return True


SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/margin": "margin {:+.3f}",
    "rewards/accuracy": "accuracy {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.1f} GiB",
}


SHOWN_OF_SHIFT = {
    "shift/kl": "KL {:.2f}",
    "shift/chosen_gap": "gap to chosen {:+.2f}",
    "shift/rejected_gap": "to rejected {:+.2f}",
    "shift/response_gap": "gap to responses {:+.2f}",
    "shift/completion_gap": "gap to completions {:+.2f}",
}


def describe(record: Record) -> str:
    """A record's main metrics in one line."""
    shift = "  ".join(_facts(record.metrics, SHOWN_OF_SHIFT))
    if record.kind == "shift":
        return f"own samples: {shift}"
    prefix = "eval/" if record.kind == "evaluation" else ""
    facts = _facts(record.metrics, {prefix + name: text for name, text in SHOWN.items()})
    if prefix:
        return "evaluation: " + "  ".join([*facts, *([f"own samples: {shift}"] if shift else [])])
    left = record.metrics.get("seconds_left", 0.0)
    return "  ".join(facts) + (f"  {duration(left)} left" if left >= 1 else "")


def _facts(metrics: Mapping[str, float], shown: Mapping[str, str]) -> list[str]:
    return [text.format(metrics[name]) for name, text in shown.items() if name in metrics]


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 12m 05s, 3h 20m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
