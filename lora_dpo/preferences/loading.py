"""From `Data` to the training and evaluation records of a run."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

from lora_dpo.errors import DataError, RecipeError
from lora_dpo.preferences.building import DEMONSTRATIONS, PREFERENCES, RATINGS
from lora_dpo.preferences.mismatched import with_mismatched
from lora_dpo.preferences.mixture import (
    Record,
    held_out_prompts,
    prompt_key,
    repeat,
    sample,
    without_prompts,
)
from lora_dpo.preferences.prompts import PROMPTS
from lora_dpo.preferences.records import (
    AnyRecord,
    BadRowError,
    Demonstration,
    Preference,
    Prompt,
    Rating,
    RefusalError,
    Row,
    Where,
)
from lora_dpo.preferences.sources import rows_of, source_name
from lora_dpo.recipe import Data, Source

SKIP_HINT = "(data.on_bad_row=skip skips such rows and counts them)"


@dataclass(frozen=True)
class Loaded(Generic[Record]):
    """The records of a run, in the order of their sources.

    skipped: bad rows by reason, of training and evaluation sources.
    first_skipped: the first row of each reason.
    leaked: how many training rows were dropped because their prompt is in the evaluation set.
    """

    train: list[Record]
    eval: list[Record]
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: Mapping[str, Where] = field(default_factory=dict)
    leaked: int = 0


def load_preferences(data: Data, *, seed: int = 0, base_dir: Path | None = None) -> Loaded[Preference]:
    """Read, validate, mix and split the pairs that `data` names: a pure function of the files and the seed.

    Sources may be `datasets.Dataset` objects; rows in memory are called "dataset" in messages.
    base_dir: what relative paths start from (the working directory if None).
    Raises DataError for what cannot be read or used, with file and row; RecipeError for keys that contradict.
    """
    return _load(data, PREFERENCES[data.format], seed, base_dir)


def load_demonstrations(data: Data, *, seed: int = 0, base_dir: Path | None = None) -> Loaded[Demonstration]:
    """As `load_preferences`, for SFT; of a preference pair the chosen response is taken."""
    return _load(data, DEMONSTRATIONS[data.format], seed, base_dir)


def load_ratings(data: Data, *, seed: int = 0, base_dir: Path | None = None) -> Loaded[Rating]:
    """As `load_preferences`, for KTO; a preference pair becomes two ratings, one of each kind.

    Every rating has another one's response beside its own (see `mismatched`), within training and within
    evaluation.
    """
    loaded = _load(data, RATINGS[data.format], seed, base_dir)
    for name, records in (("training", loaded.train), ("evaluation", loaded.eval)):
        if len(records) == 1:
            why = "KTO's estimate of the KL divergence takes the response of another one"
            raise DataError(f"{records[0].where} is the only rating for {name}: {why}")
    return replace(loaded, train=with_mismatched(loaded.train), eval=with_mismatched(loaded.eval))


def load_prompts(data: Data, *, seed: int = 0, base_dir: Path | None = None) -> Loaded[Prompt]:
    """As `load_preferences`, of any rows with a prompt; what else they hold is ignored."""
    return _load(data, PROMPTS[data.format], seed, base_dir)


def describe_ratings(records: Sequence[AnyRecord]) -> list[str]:
    """A line to print: how many are of each kind, which KTO's weights depend on. None for other records."""
    labels = [record.desirable for record in records if isinstance(record, Rating)]
    if not labels:
        return []
    return [f"ratings: {sum(labels):,} desirable, {len(labels) - sum(labels):,} undesirable"]


def describe_skipped(loaded: Loaded[Any]) -> list[str]:
    """Lines to print: bad rows by reason, most frequent first, and training rows dropped as leaks."""
    lines = [
        f"{_rows(count)} skipped: {reason} (first: {loaded.first_skipped[reason]})"
        for reason, count in loaded.skipped.most_common()
    ]
    if loaded.leaked:
        lines.append(f"{_rows(loaded.leaked)} dropped from training: the prompt is in the evaluation set")
    return lines


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


@dataclass(frozen=True)
class _Source:
    """A recipe's `Source`, whose rows may also be in memory. limit: at most this many rows are read."""

    rows: Any
    weight: float = 1.0
    limit: int | None = None


class _Reader(Generic[Record]):
    """Reads sources and counts the rows that are skipped."""

    def __init__(
        self, data: Data, build: Callable[[Row, Where], list[Record]], base_dir: Path | None
    ) -> None:
        self._skip = data.on_bad_row == "skip"
        self._build = build
        self._base_dir = base_dir
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, Where] = {}

    def read(self, source: _Source, last: int = 0) -> tuple[list[Record], list[Record]]:
        """The usable records before the source's last `last` rows, and among those."""
        places: list[tuple[int, Record]] = []
        count = 0
        with contextlib.closing(rows_of(source.rows, self._base_dir)) as rows:
            for count, (where, raw) in enumerate(itertools.islice(rows, source.limit), start=1):
                places += [(count, record) for record in self._records(where, raw)]
        if count == 0:
            raise DataError(f"{source_name(source.rows)}: there are no rows")
        if last >= count:
            raise DataError(
                f"data.eval_last={last} leaves nothing of the {_rows(count)} of {source_name(source.rows)}"
            )
        first_last = count - last + 1
        before = [record for place, record in places if place < first_last]
        return before, [record for place, record in places if place >= first_last]

    def _records(self, where: Where, raw: object) -> list[Record]:
        try:
            return self._build(_row(raw), where)
        except RefusalError as error:
            refusal = error
        except RecursionError:  # comparing or describing what the parser could just read
            refusal = RefusalError("nested too deeply")
        if not self._skip:
            raise BadRowError(where, refusal.reason, refusal.detail, SKIP_HINT)
        self.skipped[refusal.reason] += 1
        self.first_skipped.setdefault(refusal.reason, where)
        return []


def _row(raw: object) -> Row:
    if isinstance(raw, RefusalError):
        raise raw
    if not isinstance(raw, Mapping):
        raise RefusalError("not an object", f"a row must be an object, this one is a {type(raw).__name__}")
    return {str(column): value for column, value in raw.items() if value is not None}


def _load(
    data: Data, build: Callable[[Row, Where], list[Record]], seed: int, base_dir: Path | None
) -> Loaded[Record]:
    train_sources, eval_sources = _sources(data.train), _sources(data.eval)
    _check(data, train_sources)
    reader = _Reader(data, build, base_dir)
    parts: list[list[Record]] = []
    evaluation: list[Record] = []
    for source in train_sources:
        before, last = reader.read(source, data.eval_last)
        parts.append(before)
        evaluation += last
    for index, source in enumerate(eval_sources):
        evaluation += repeat(reader.read(source)[0], source.weight, f"{seed}:eval:{index}")
    if data.eval_fraction:
        held_out = held_out_prompts(_joined(parts), data.eval_fraction, seed)
        evaluation = [record for record in _joined(parts) if prompt_key(record) in held_out]
    else:
        held_out = {prompt_key(record) for record in evaluation}
    kept = [without_prompts(part, held_out) for part in parts] if held_out else parts
    train = [
        repeat(part, source.weight, f"{seed}:train:{index}")
        for index, (part, source) in enumerate(zip(kept, train_sources, strict=True))
    ]
    loaded = Loaded(
        sample(_joined(train), data.max_rows, f"{seed}:max_rows"),
        sample(evaluation, data.max_eval_rows, f"{seed}:max_eval_rows"),
        reader.skipped,
        reader.first_skipped,
        leaked=0 if data.eval_fraction else len(_joined(parts)) - len(_joined(kept)),
    )
    _check_not_empty(loaded, bool(eval_sources or data.eval_fraction or data.eval_last))
    return loaded


def _joined(parts: list[list[Record]]) -> list[Record]:
    return [record for part in parts for record in part]


def _sources(given: Any) -> list[_Source]:
    """data.train or data.eval as a list."""
    several = given if isinstance(given, (tuple, list)) else (given,)
    return [
        _Source(item.path, item.weight, item.rows) if isinstance(item, Source) else _Source(item)
        for item in several
    ]


def _check(data: Data, train: list[_Source]) -> None:
    if not train:
        raise RecipeError("data.train names no source")
    if data.eval_last and len(train) > 1:
        takes = f"it takes a number of rows of one training source, and data.train names {len(train)}"
        raise RecipeError(f"data.eval_last={data.eval_last}: {takes}")


def _check_not_empty(loaded: Loaded[Any], wants_evaluation: bool) -> None:
    for name, records, wanted in (
        ("training", loaded.train, True),
        ("evaluation", loaded.eval, wants_evaluation),
    ):
        if wanted and not records:
            why = "; ".join(describe_skipped(loaded))
            raise DataError(f"no usable row is left for {name}" + (f": {why}" if why else ""))
