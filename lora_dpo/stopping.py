"""SIGINT, SIGTERM and SIGHUP: how whoever wants a command to end is answered.

Outside of what must not be cut, a signal raises `Interrupted` where the program stands. Inside `Stops.held`
the first one is noted for the caller, who ends in his own time; the same once more raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HANG_UP = getattr(signal, "SIGHUP", None)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end. A KeyboardInterrupt, which no library catches as an error."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit status for it, as shells count: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Stopped(Exception):
    """The run was asked to stop, and has. code: the exit status for it. checkpoint: the newest, if any."""

    def __init__(self, number: int, checkpoint: Path | None, *, begun: bool = True):
        if checkpoint is not None:
            text = f"stopped; go on with --resume (last checkpoint: {checkpoint})"
        elif begun:
            text = "stopped before the first checkpoint; --resume begins again from the first step"
        else:
            text = "stopped before the first step: nothing is lost, the same command begins again"
        super().__init__(text)
        self.code = 128 + number


class Stops:
    """What was asked for. asked: the number of the first signal that came, or None."""

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        self.asked: int | None = None
        self._say = say
        self._held = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let what is inside end whole: a first signal only sets `asked`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def check(self) -> None:
        """Raise Interrupted if a signal came while it was held, or raised where that was swallowed."""
        if self.asked is not None:
            raise Interrupted(self.asked)

    def handle(self, number: int, frame: object = None) -> None:
        """What the system calls."""
        before, self.asked = self.asked, number if self.asked is None else self.asked
        if not self._held:
            raise Interrupted(number)
        if before is None:
            self._say("stopping after this step; once more stops at once")
        elif number == before and number != _HANG_UP:
            raise Interrupted(number)
        # Else it is the same wish by another way: a closing terminal sends SIGHUP twice, torchrun passes on
        # a Ctrl-C that came already as SIGTERM.

    @contextmanager
    def listening(self) -> Iterator[Stops]:
        """Answers signals for the while. One that is ignored (nohup, a job in the background) stays so.

        Only in the main thread; elsewhere the caller's program owns the signals.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGHUP")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            before = {number: signal.getsignal(number) for number in numbers}
            for number, handler in before.items():
                if handler not in (signal.SIG_IGN, None):
                    signal.signal(number, self.handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)
