"""Calls to an OpenAI-compatible endpoint: time-outs, retries, and a key that is never shown."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_dpo.errors import RecipeError, RunError

PASSING = (408, 409, 425, 429)
"""Statuses, besides 5xx, after which the same call may succeed later."""

FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 30.0, 300.0
"""Seconds: the waits between attempts, doubled each time; and what an endpoint may ask for by Retry-After."""

LARGEST_ANSWER = 4 * 2**20
"""Bytes; an answer holds a line of JSON."""


class PassingError(Exception):
    """A call failed in a way that may pass. after: seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Following one would send the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Client:
    """POSTs to {url}/chat/completions. key: sent as a bearer token, shown nowhere. timeout: seconds for a
    whole answer. retries: further attempts after one that failed in a way that may pass. first_wait: seconds
    before the first of them.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 6
    first_wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        self.url = checked_url(self.url)
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise RecipeError("judge.api_key_env names a variable whose value can't stand in a header")
        self.calls = self.failures = 0
        self._random = random.Random()
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def complete(self, messages: Sequence[dict[str, str]], stop: threading.Event) -> str:
        """The text that the model answers with, at temperature 0. Raises RunError when all attempts failed,
        or at once for what will not pass.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(messages)
            except PassingError as error:
                with self._lock:
                    self.failures += 1
                if attempt == self.retries:
                    times = f" ({attempt + 1} attempts)" if attempt else ""
                    raise RunError(f"judge: {self.url} failed{times}: {error}") from None
                if stop.wait(self._wait(attempt, error.after)):
                    raise RunError(f"judge: stopped while {self.url} was failing: {error}") from None
        raise AssertionError("not reached")

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Seconds: what the endpoint asks for, else exponential with jitter, so that calls spread out."""
        if asked is not None:
            return min(max(asked, 0.0), LONGEST_ASKED)
        return min(self.first_wait * 2**attempt, LONGEST_WAIT) * self._random.uniform(0.5, 1.0)

    def _once(self, messages: Sequence[dict[str, str]]) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages), "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        with self._lock:
            self.calls += 1
        try:
            until = time.monotonic() + self.timeout
            with self._opener.open(request, timeout=self.timeout) as response:
                return _text_of(_read(response, until), response.headers.get("Content-Type"))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise PassingError(f"no answer within {self.timeout:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise PassingError(f"no answer within {self.timeout:g} seconds") from None
            raise PassingError(f"no connection: {error.reason}") from None
        except (http.client.HTTPException, OSError) as error:
            raise PassingError(f"the connection broke: {type(error).__name__}: {error}") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What a status other than success is: one that may pass, or the end."""
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (http.client.HTTPException, OSError):
            said = ""
        said = " ".join(self._without_key(said).split())[:300]
        reason = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in PASSING or error.code >= 500:
            return PassingError(reason, _seconds(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            reason += "; judge.api_key_env names the environment variable that holds the key"
        elif 300 <= error.code < 400:
            place = self._without_key(str(error.headers.get("Location")))
            reason = f"HTTP {error.code}: it has moved to {place}; give that address, it is not followed"
        return RunError(f"judge: {self.url} refused: {reason}")

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def checked_url(url: str) -> str:
    """The address without a slash at its end. Raises RecipeError for what is no http(s) address."""
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, right = None, False
    if parts is None or not right or url != "".join(url.split()):
        raise RecipeError(f"judge.of got endpoint:{url}; it takes an address such as https://HOST/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise RecipeError(
            "judge.of: the endpoint's address holds a user, a query or a fragment; the key goes into an"
            " environment variable, named by judge.api_key_env"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _read(response: Any, until: float) -> bytes:
    """The whole body, by the deadline: a socket's time-out is for each read alone."""
    parts: list[bytes] = []
    size, expected = 0, response.headers.get("Content-Length")
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise PassingError(f"an answer of more than {LARGEST_ANSWER:,} bytes")
        if time.monotonic() > until:
            raise TimeoutError
    if expected is not None and expected.isdigit() and size < int(expected):
        raise PassingError(f"the answer was cut: {size:,} of {int(expected):,} bytes")
    return b"".join(parts)


def _text_of(body: bytes, kind: str | None) -> str:
    """choices[0].message.content. Raises PassingError for another body, as proxies write in a bad moment."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        shown = " ".join(body[:200].decode("utf-8", "replace").split())
        raise PassingError(f"an answer that is no chat completion ({kind}): {shown!r}") from None
    if text is None:
        return ""  # a refusal, or only reasoning
    if not isinstance(text, str):
        raise PassingError(f"an answer whose content is no text but {type(text).__name__}")
    return text


def _seconds(text: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Retry-After: seconds, or a date."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(text).timestamp() - now()
        except (TypeError, ValueError, OverflowError):
            return None
    return seconds if seconds == seconds else None
