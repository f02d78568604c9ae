"""HTTP with an end: one deadline for a whole answer, no redirects, and what a server writes made harmless."""

from __future__ import annotations

import functools
import html
import http.client
import io
import json
import socket
import time
import urllib.parse
import urllib.request
from typing import Any

LARGEST_ANSWER = 4 * 2**20
"""Bytes; an answer holds a line of JSON."""


class BrokenError(Exception):
    """An answer that is too large, or was cut."""


def opener() -> urllib.request.OpenerDirector:
    """open(request, timeout=T): headers and body, of an error too, are there within T seconds of the start,
    else TimeoutError; connecting, and sending, take T at most each.
    """
    return urllib.request.build_opener(_NoRedirects, _Http, _Https)


def read(response: http.client.HTTPResponse) -> bytes:
    """The whole body. Raises BrokenError, TimeoutError, and what http.client does."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise BrokenError(f"an answer of more than {LARGEST_ANSWER:,} bytes")
    if response.length:  # what is left of Content-Length
        raise BrokenError(f"the answer was cut: {size:,} of {size + response.length:,} bytes")
    return b"".join(parts)


def harmless(text: str, key: str | None, most: int) -> str:
    """A server's text as one line that may be printed: without the key, however it is escaped, and with
    nothing that commands a terminal. It is cut to `most` characters last, so that no part of a key stays.
    """
    for secret in _spellings(key) if key else ():
        text = text.replace(secret, "***")
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)[:most]


def _spellings(key: str) -> list[str]:
    """The key as JSON, addresses and HTML write it; the longest first, since one may be part of another."""
    quoted = json.dumps(key)[1:-1]
    found = {key, quoted, quoted.replace("/", "\\/"), urllib.parse.quote(key, safe=""), html.escape(key)}
    return sorted(found, key=len, reverse=True)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Following one would send the key elsewhere. The place it names is not even parsed: it may be none."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _InTime(urllib.request.AbstractHTTPHandler):
    def do_open(self, http_class: Any, req: urllib.request.Request, **more: Any) -> Any:
        def connection(host: str, *, timeout: float, **others: Any) -> http.client.HTTPConnection:
            made = http_class(host, timeout=timeout, **others)
            made.response_class = functools.partial(_Response, until=time.monotonic() + timeout)
            return made

        return super().do_open(connection, req, **more)  # pyright: ignore[reportArgumentType]


class _Http(_InTime, urllib.request.HTTPHandler):
    pass


class _Https(_InTime, urllib.request.HTTPSHandler):
    pass


class _Response(http.client.HTTPResponse):
    """A response that is read by `until` (of time.monotonic), or not."""

    def __init__(self, sock: socket.socket, *args: Any, until: float, **more: Any):
        super().__init__(sock, *args, **more)
        self.fp.close()
        self.fp = io.BufferedReader(_Stream(sock, until))


class _Stream(io.RawIOBase):
    """What a socket sends until a moment. A socket's own time-out begins anew with every byte."""

    def __init__(self, sock: socket.socket, until: float):
        self._socket, self._until = sock, until
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open though http.client closes it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
