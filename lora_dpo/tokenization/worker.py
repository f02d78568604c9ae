"""A process that tokenizes for another: requests come in on stdin, answers go out on stdout.

A frame is eight bytes with a length (little-endian), then that many bytes. A request is JSON: either
{"settings", "skip_refused"}, answered with the digest of the settings that it came to here, or {"records"},
answered with `flat.to_bytes`: branches, and the outcomes in order with null for each of the branches. A
record that raises ends the list: whoever asked does that one again, and so meets the error itself.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from typing import IO, Any

from lora_dpo.tokenization.branches import Branches
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.flat import to_bytes
from lora_dpo.tokenization.outcomes import Outcome, outcome
from lora_dpo.tokenization.portable import record_from, settings_digest, tokenizer_from


def read_frame(stream: IO[bytes]) -> bytes:
    """Raises EOFError at the stream's end."""
    size = _read(stream, 8)
    return _read(stream, int.from_bytes(size, "little"))


def write_frame(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library that prints must not print into an answer
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    tokenizer, skip_refused = None, False
    while True:
        request = json.loads(waiting.get())
        if "settings" in request:
            tokenizer, skip_refused = tokenizer_from(request["settings"]), request["skip_refused"]
            write_frame(answers, settings_digest(tokenizer.settings()).encode())
        else:
            assert tokenizer is not None
            write_frame(answers, _answer(request, tokenizer, skip_refused))


def _listen(requests: IO[bytes], waiting: queue.SimpleQueue[bytes]) -> None:
    """Pass frames on; end the process, whatever it is doing, when whoever asked is gone."""
    try:
        while True:
            waiting.put(read_frame(requests))
    finally:
        os._exit(0)


def _answer(request: dict[str, Any], tokenizer: ChatTokenizer, skip_refused: bool) -> bytes:
    done: list[Outcome] = []
    for text in request["records"]:
        try:
            done.append(outcome(record_from(text), tokenizer, skip_refused))
        except Exception:  # of whatever kind: it is met again where it can be raised
            break
    dropped = [None if isinstance(item, Branches) else item for item in done]
    return to_bytes([item for item in done if isinstance(item, Branches)], {"outcomes": dropped})
