"""From the recipe's data section to branches, with everything that was left out said in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lora_dpo.losses import Objective
from lora_dpo.preferences import (
    Demonstration,
    Preference,
    describe_skipped,
    load_demonstrations,
    load_preferences,
)
from lora_dpo.recipe import Data
from lora_dpo.tokenization import Branches, ChatTokenizer, tokenize
from lora_dpo.training.progress import Display


@dataclass(frozen=True)
class TrainingData:
    """Tokenized examples, and the records that they were made from."""

    train: list[Branches]
    eval: list[Branches]
    train_records: list[Preference] | list[Demonstration]
    eval_records: list[Preference] | list[Demonstration]
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
    """Load, split and tokenize. An objective with one side takes demonstrations; with two, pairs."""
    chat = chat_tokenizer(tokenizer, data)
    load = load_demonstrations if len(objective.sides) == 1 else load_preferences
    loaded = load(data, seed=seed)
    for line in describe_skipped(loaded):
        display.say(line)
    train = _tokenize(loaded.train, chat, "tokenizing", display)
    held_out = _tokenize(loaded.eval, chat, "tokenizing held-out rows", display) if loaded.eval else []
    tokens = sum(item.tokens for item in train)
    display.say(f"data: {len(train):,} training and {len(held_out):,} held-out examples, {tokens:,} tokens")
    return TrainingData(train, held_out, loaded.train, loaded.eval, chat)


def _tokenize(
    records: Sequence[Preference] | Sequence[Demonstration], chat: ChatTokenizer, what: str, display: Display
) -> list[Branches]:
    with display.counting(what, len(records)) as advance:
        done = tokenize(records, chat, progress=advance)
    if done.dropped:
        display.say(done.describe_dropped())
    return done.branches
