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
from typing import cast

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.judging.endpoint.transport import BrokenError, harmless, opener, read

PASSING = (408, 409, 425, 429)
"""Statuses, besides 5xx, after which the same call may succeed later."""

FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 30.0, 300.0
"""Seconds: the waits between attempts, doubled each time; and what an endpoint may ask for by Retry-After."""

SHOWN = 300
"""So many characters of what a server wrote stand in an error."""


class PassingError(Exception):
    """A call failed in a way that may pass. after: seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


@dataclass
class Client:
    """POSTs to {url}/chat/completions. key: sent as a bearer token, shown nowhere. timeout: seconds for a
    whole answer, up to its last byte. retries: further attempts after one that failed in a way that may pass.
    first_wait: seconds before the first of them.
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
        self._opener = opener()

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
        """Seconds: exponential with jitter, so that calls spread out; more where it is asked for."""
        own = min(self.first_wait * 2**attempt, LONGEST_WAIT) * self._random.uniform(0.5, 1.0)
        return own if asked is None else max(own, min(asked, LONGEST_ASKED))

    def shown(self, text: object, most: int = SHOWN) -> str:
        """What the server wrote, as it may stand in an error or a note: never print it otherwise."""
        return harmless(str(text), self.key, most)

    def _once(self, messages: Sequence[dict[str, str]]) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages), "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        with self._lock:
            self.calls += 1
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._text_of(read(response), response.headers.get("Content-Type"))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except BrokenError as error:
            raise PassingError(str(error)) from None
        except TimeoutError:
            raise PassingError(f"no answer within {self.timeout:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise PassingError(f"no answer within {self.timeout:g} seconds") from None
            raise PassingError(f"no connection: {self.shown(error.reason)}") from None
        except (http.client.HTTPException, OSError, ValueError) as error:  # ValueError: headers that are none
            said = self.shown(f"{type(error).__name__}: {error}")
            raise PassingError(f"the connection broke: {said}") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What a status other than success is: one that may pass, or the end."""
        try:
            said = self.shown(read(cast(http.client.HTTPResponse, error.fp)).decode("utf-8", "replace"))
        except (BrokenError, http.client.HTTPException, OSError, ValueError):
            said = ""  # a body that was cut may end within the key
        reason = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in PASSING or error.code >= 500:
            return PassingError(reason, _seconds(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            reason += "; judge.api_key_env names the environment variable that holds the key"
        elif 300 <= error.code < 400:
            place = self.shown(error.headers.get("Location") or "no address")
            reason = f"HTTP {error.code}: it has moved to {place}; give that address, it is not followed"
        return RunError(f"judge: {self.url} refused: {reason}")

    def _text_of(self, body: bytes, kind: str | None) -> str:
        """choices[0].message.content. Raises PassingError for another body, as proxies write in a bad
        moment.
        """
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            said = self.shown(body.decode("utf-8", "replace"), 200)
            raise PassingError(
                f"an answer that is no chat completion ({self.shown(kind, 80)}): '{said}'"
            ) from None
        if text is None:
            return ""  # a refusal, or only reasoning
        if not isinstance(text, str):
            raise PassingError(f"an answer whose content is no text but {type(text).__name__}")
        return text


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


def _seconds(text: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Retry-After: seconds, or a date."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(text).timestamp() - now()
        except (TypeError, ValueError, IndexError, OverflowError, OSError):
            return None
    return seconds if seconds == seconds else None
