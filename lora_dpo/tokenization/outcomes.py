"""What becomes of one record, and of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lora_dpo.errors import DataError
from lora_dpo.preferences import AnyRecord, Where
from lora_dpo.tokenization.branches import Branches
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.truncation import Dropped

REFUSED = "the chat template refuses the conversation"

Outcome = Branches | str
"""What a record became; or, if it was dropped, the reason."""


@dataclass(frozen=True)
class Tokenized:
    """branches: in the records' order. dropped: reason → how many. first_dropped: reason → its first row.

    cached: whether it was read from the cache.
    """

    branches: list[Branches]
    dropped: Counter[str]
    first_dropped: dict[str, Where]
    cached: bool = False

    def add(self, record: AnyRecord, outcome: Outcome) -> None:
        if isinstance(outcome, Branches):
            self.branches.append(outcome)
        else:
            self.dropped[outcome] += 1
            self.first_dropped.setdefault(outcome, record.where)

    def describe_dropped(self) -> str:
        """One line a reason, empty if nothing was dropped."""
        return "\n".join(
            f"{count} dropped: {reason} (first: {self.first_dropped[reason]})"
            for reason, count in self.dropped.most_common()
        )


def outcome(record: AnyRecord, tokenizer: ChatTokenizer, skip_refused: bool) -> Outcome:
    """Raises DataError (unless `skip_refused`, which makes it a reason) if the template refuses the record;
    ModelError if the tokenizer is of no use.
    """
    try:
        return tokenizer.branches(record)
    except Dropped as dropped:
        return dropped.reason
    except DataError as error:
        if not skip_refused:
            raise DataError(f"{error} (data.on_bad_row=skip skips such rows and counts them)") from error
        return REFUSED
