"""From the recipe's data section to branches, with everything that was left out said in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_dpo.errors import RecipeError
from lora_dpo.losses import Objective
from lora_dpo.preferences import (
    Demonstration,
    Loaded,
    Preference,
    Rating,
    describe_ratings,
    describe_skipped,
    load_demonstrations,
    load_preferences,
    load_ratings,
)
from lora_dpo.recipe import Data
from lora_dpo.run_directory import cache_folder
from lora_dpo.tokenization import Branches, ChatTokenizer, Tokenized, tokenize
from lora_dpo.training.progress import Display

Records = list[Preference] | list[Demonstration] | list[Rating]
TOKENIZED = "tokenized"
"""The folder for tokenized records in the cache folder."""


@dataclass(frozen=True)
class Kind:
    """load: how such records are read. sides: how many sides an example of them has."""

    load: Callable[..., Loaded[Any]]
    sides: int


KINDS = {
    "pairs": Kind(load_preferences, 2),
    "demonstrations": Kind(load_demonstrations, 1),
    "ratings": Kind(load_ratings, 2),
}
"""What an objective's `records` can be."""


@dataclass(frozen=True)
class TrainingData:
    """Tokenized examples to train on, and those held out."""

    train: list[Branches]
    eval: list[Branches]
    tokenizer: ChatTokenizer


@dataclass(frozen=True)
class HeldOut:
    """Held-out records, and the examples that they became (fewer, where some had to be dropped)."""

    records: Records
    eval: list[Branches]
    tokenizer: ChatTokenizer


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, data: Data) -> ChatTokenizer:
    return ChatTokenizer(
        tokenizer,
        chat_template=data.chat_template,
        max_tokens=data.max_tokens,
        max_prompt_tokens=data.max_prompt_tokens,
    )


def prepare_data(
    data: Data, objective: Objective, tokenizer: PreTrainedTokenizerBase, *, seed: int, display: Display
) -> TrainingData:
    """Load, split and tokenize. Raises DataError naming file and row."""
    chat = chat_tokenizer(tokenizer, data)
    train_records, held_out_records = _load(data, objective, seed, display)
    train = _tokenize(train_records, chat, "tokenizing", display, data)
    held_out = _tokenize(held_out_records, chat, "tokenizing held-out rows", display, data)
    tokens = sum(item.tokens for item in train.branches)
    counts = f"{len(train.branches):,} training and {len(held_out.branches):,} held-out examples"
    known = " (tokenized before: read from the cache)" if train.cached and held_out.cached else ""
    display.say(f"data: {counts}, {tokens:,} tokens{known}")
    for line in describe_ratings(train_records):
        display.say(line)
    return TrainingData(train.branches, held_out.branches, chat)


def prepare_held_out(
    data: Data,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    display: Display,
    source: str | None = None,
) -> HeldOut:
    """The rows that training held out, or all of another source; nothing else is tokenized."""
    chat = chat_tokenizer(tokenizer, data)
    if source is None:
        records = _load(data, objective, seed, display)[1]
    else:
        alone = replace(
            data, train=source, eval=(), eval_fraction=0.0, eval_last=0, max_rows=data.max_eval_rows
        )
        records = _load(alone, objective, seed, display)[0]
    done = _tokenize(records, chat, "tokenizing held-out rows", display, data)
    return HeldOut(records, done.branches, chat)


def _load(data: Data, objective: Objective, seed: int, display: Display) -> tuple[Records, Records]:
    """(training records, held-out records) of the kind that the objective declares."""
    loaded = _kind(objective).load(data, seed=seed)
    for line in describe_skipped(loaded):
        display.say(line)
    return loaded.train, loaded.eval


def _kind(objective: Objective) -> Kind:
    """Raises RecipeError where an objective declares what it can't be given."""
    name = type(objective).__name__
    kind = KINDS.get(objective.records)
    if kind is None:
        raise RecipeError(f"{name}.records is {objective.records!r}; it takes one of {', '.join(KINDS)}")
    if len(objective.sides) != kind.sides:
        takes = f"examples of {objective.records} have {kind.sides}"
        raise RecipeError(
            f"{name}.sides names {len(objective.sides)} ({', '.join(objective.sides)}); {takes}"
        )
    return kind


def _tokenize(records: Records, chat: ChatTokenizer, what: str, display: Display, data: Data) -> Tokenized:
    if not records:
        return Tokenized([], Counter(), {}, cached=True)
    with display.counting(what, len(records)) as advance:
        done = tokenize(
            records,
            chat,
            progress=advance,
            skip_refused=data.on_bad_row == "skip",
            workers=data.workers,
            cache=cache_folder() / TOKENIZED,
        )
    if done.dropped:
        display.say(done.describe_dropped())
    return done
