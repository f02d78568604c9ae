"""A whole data set through the tokenizer, with a count of what had to be dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lora_dpo.errors import DataError
from lora_dpo.preferences import Demonstration, Preference, Where
from lora_dpo.tokenization.branches import Branches
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.truncation import Dropped

REFUSED = "the chat template refuses the conversation"


@dataclass(frozen=True)
class Tokenized:
    """branches: in the records' order. dropped: reason → how many. first_dropped: reason → its first row."""

    branches: list[Branches]
    dropped: Counter[str]
    first_dropped: dict[str, Where]

    def describe_dropped(self) -> str:
        """One line a reason, empty if nothing was dropped."""
        return "\n".join(
            f"{count} dropped: {reason} (first: {self.first_dropped[reason]})"
            for reason, count in self.dropped.most_common()
        )


def tokenize(
    records: Iterable[Preference | Demonstration],
    tokenizer: ChatTokenizer,
    progress: Callable[[int], None] | None = None,
    *,
    skip_refused: bool = False,
) -> Tokenized:
    """Tokenize every record; `progress` hears of each one that is done.

    Raises DataError if none is left, or (unless `skip_refused`, which counts it as dropped) the template
    refuses
    one; ModelError if the tokenizer is of no use.
    """
    tokenized = Tokenized([], Counter(), {})
    for record in records:
        try:
            tokenized.branches.append(tokenizer.branches(record))
        except Dropped as dropped:
            tokenized.dropped[dropped.reason] += 1
            tokenized.first_dropped.setdefault(dropped.reason, dropped.where)
        except DataError as error:
            if not skip_refused:
                raise DataError(f"{error} (data.on_bad_row=skip skips such rows and counts them)") from error
            tokenized.dropped[REFUSED] += 1
            tokenized.first_dropped.setdefault(REFUSED, record.where)
        if progress is not None:
            progress(1)
    if not tokenized.branches:
        reasons = tokenized.describe_dropped() or "there are no rows"
        raise DataError(f"no row is left after tokenization: {reasons}; data.max_tokens may be too small")
    return tokenized
