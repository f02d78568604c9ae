"""A Python function as the judge."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.judging.judges import Candidates, fingerprint
from lora_dpo.recipe.own import import_function

BATCH = ("prompts", "responses")
"""A function whose parameters bear these names takes many at a time."""


class FunctionJudge:
    """function(prompt, response) → a number; or function(prompts, responses) → a number each.

    A prompt is a list of messages, or rendered text. `of`: what errors call the function. source: what its
    fingerprint is a hash of; the text of its file, or else of the function.
    """

    name = "function"

    def __init__(self, function: Callable[..., Any], of: str | None = None, source: str | None = None):
        self.function = function
        self.of = of or getattr(function, "__qualname__", type(function).__name__)
        self.batch = _takes_many(function)
        self.fingerprint = fingerprint("function", self.of, source or _source(function))

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises RunError, naming prompt and function, for what it raises, and for no finite number."""
        rewards = []
        for candidates in group:
            made = self._call(candidates)
            rewards.append([self._number(value, candidates) for value in made])
            if progress is not None:
                progress(1)
        return rewards

    def _call(self, candidates: Candidates) -> list[Any]:
        responses = candidates.responses
        try:
            if not self.batch:
                return [self.function(_copy(candidates), response) for response in responses]
            made = list(self.function([_copy(candidates) for _ in responses], list(responses)))
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            # Let through, sys.exit(0) there would end the command as if it had done its work.
            said = f"{type(error).__name__}: {_told(error, str)}"
            raise RunError(f"judge.of: {self.of} on prompt {candidates.id}: {said}") from error
        if len(made) != len(responses):
            raise RunError(
                f"judge.of: {self.of} on prompt {candidates.id} gave {len(made)} numbers for {len(responses)}"
                " responses"
            )
        return made

    def _number(self, value: Any, candidates: Candidates) -> float:
        try:
            number = math.nan if isinstance(value, (str, bytes, bytearray)) else float(value)
        except (Exception, SystemExit):  # a tensor may raise RuntimeError, others what they like
            number = math.nan
        if not math.isfinite(number):
            raise RunError(
                f"judge.of: {self.of} on prompt {candidates.id} gave {_told(value, repr):.80}; it takes a"
                " finite number"
            )
        return number


def function_judge(of: str) -> FunctionJudge:
    """The judge of "FILE.py:NAME" or "module:NAME". Raises RecipeError."""
    place = Path(of.rpartition(":")[0]).expanduser()
    if place.suffix == ".py" and not place.is_file():
        raise RecipeError(f"judge.of got function:{of}: there is no file {place}")
    try:
        function = import_function(of, "judge.of")
    except SystemExit as error:
        raise RecipeError(
            f"judge.of got function:{of}: {place} ends with sys.exit({error.code!r}) when it is imported; put"
            ' what runs it as a script under if __name__ == "__main__"'
        ) from error
    source = place.read_text(encoding="utf-8", errors="replace") if place.suffix == ".py" else None
    # Where the file lies does not count: the same file elsewhere is the same judge.
    name = f"{place.name}:{of.rpartition(':')[2]}" if source is not None else of
    return FunctionJudge(function, name, source)


def _copy(candidates: Candidates) -> Any:
    """The prompt as the function gets it: what it changes there is its own."""
    if isinstance(candidates.prompt, str):
        return candidates.prompt
    return copy.deepcopy([dict(message) for message in candidates.prompt])


def _told(value: object, how: Callable[[object], str]) -> str:
    """A value of the user's own code in words; that code may fail here too."""
    try:
        return how(value)
    except Exception as error:
        return f"a {type(value).__name__} that {type(error).__name__} keeps from being shown"


def _takes_many(function: Callable[..., Any]) -> bool:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in ones may not tell
        return False
    return tuple(names[:2]) == BATCH


def _source(function: Callable[..., Any]) -> str:
    """What tells one function from another: its own text, where it stands, and that of its file.

    What it closes over does not count; an attribute `fingerprint`, a text, stands for all of that.
    """
    own = getattr(function, "fingerprint", None)
    if isinstance(own, str):
        return own
    target: Any = function if inspect.isroutine(function) else type(function)
    try:
        lines, start = inspect.getsourcelines(target)
        file = inspect.getsourcefile(target)
        text = Path(file).read_bytes() if file is not None else b""
        return f"{start} {''.join(lines)} {xxhash.xxh3_64_hexdigest(text)}"
    except (OSError, TypeError):  # typed at a prompt, or built in
        code = getattr(target, "__code__", None)
        return repr((code.co_code, code.co_names)) if code is not None else repr(target)
