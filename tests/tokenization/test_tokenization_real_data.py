"""Real preference sets and a real tokenizer, where the machine has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_dpo.preferences import Preference, Where
from lora_dpo.tokenization import ChatTokenizer, tokenize

SHARED = Path(__file__).parents[3] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not on this machine")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def message(turn: dict) -> dict:
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def records(count: int) -> list[Preference]:
    rows = json.loads((SHARED / "data/ultrafeedback_200.json").read_text())[:count]
    return [
        Preference(
            tuple(map(message, row["conversations"])),
            (message(row["chosen"]),),
            (message(row["rejected"]),),
            Where("ultrafeedback_200.json", number),
        )
        for number, row in enumerate(rows, start=1)
    ]


def test_every_side_is_tokenized_as_the_whole_conversation_and_only_the_answer_scored():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/chat-10m")
    pairs = records(60)
    tokenized = tokenize(pairs, ChatTokenizer(tokenizer, None, 100_000))
    for record, branches in zip(pairs, tokenized.branches, strict=True):
        for index, side in enumerate((record.chosen, record.rejected)):
            assert not isinstance(side, str)
            text = tokenizer.apply_chat_template([*record.prompt, *side], tokenize=False)
            ids = branches.side(index)
            assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids[branches.scored[index]]) == side[0]["content"] + "<|im_end|>"


def test_truncated_sides_keep_the_prompts_end_and_differ():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/chat-10m")
    pairs = records(60)
    tokenized = tokenize(pairs, ChatTokenizer(tokenizer, None, 256))
    assert len(tokenized.branches) + tokenized.dropped.total() == len(pairs)
    assert len(tokenized.branches) > 50
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for branches in tokenized.branches:
        for index in range(2):
            ids, first = branches.side(index), int(branches.scored[index].argmax())
            assert len(ids) <= 256
            assert ids[first - len(header) : first].tolist() == header
