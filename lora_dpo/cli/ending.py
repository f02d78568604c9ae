"""How a command ends: errors in one line, signals with their status, and a terminal that may be gone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO


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
        last_words(f"error: {error}")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit) as end:
        # typer makes every KeyboardInterrupt a silent exit 130; a run that stopped has spoken itself.
        if isinstance(end, SystemExit) and stops.asked is None:
            raise
        last_words("stopped; nothing half-written is in its place, the same command goes on or begins again")
        code = end.code if isinstance(end, Interrupted) else 128 + (stops.asked or 2)
        raise SystemExit(code) from None


def last_words(text: str, stream: TextIO | None = None) -> None:
    """To the terminal, if there is still one."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stderr, flush=True)
