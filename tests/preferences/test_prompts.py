"""Prompts to answer, out of every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.errors import DataError
from lora_dpo.preferences import load_prompts
from lora_dpo.recipe import Data

ASKED = ({"role": "user", "content": "How far?"},)
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"prompt": "How far?"},
    "as messages": {"prompt": [{"role": "user", "content": "How far?"}]},
    "a pair": {"prompt": "How far?", "chosen": "Near.", "rejected": "No."},
    "a pair that has only whole conversations": {
        "chosen": [*ASKED, {"role": "assistant", "content": "Near."}],
        "rejected": [*ASKED, {"role": "assistant", "content": "No."}],
    },
    "a demonstration": {"messages": [*ASKED, {"role": "assistant", "content": "Near."}]},
    "a conversation that waits for its answer": {"messages": [*ASKED]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "Near."}]
    },
    "Alpaca": {"instruction": "How", "input": "far?", "output": "Near."},
    "a question": {"question": "How far?", "answer": "Near."},
    "responses that nobody judged": {"prompt": "How far?", "responses": [{"text": "Near."}, {"text": "No."}]},
}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_its_prompt(tmp_path: Path, name: str):
    (found,) = load_prompts(Data(write(tmp_path, [LAYOUTS[name]]))).train
    wanted = ({"role": "user", "content": "How\nfar?"},) if name == "Alpaca" else ASKED
    assert found.prompt == wanted


def test_a_prompt_comes_once_and_held_out_ones_are_not_among_the_others(tmp_path: Path):
    rows = [{"prompt": f"question {n % 10}"} for n in range(30)]
    loaded = load_prompts(Data(write(tmp_path, rows), eval_fraction=0.3))
    texts = [item.prompt[0]["content"] for item in loaded.train]  # pyright: ignore[reportArgumentType]
    held_out = [item.prompt[0]["content"] for item in loaded.eval]  # pyright: ignore[reportArgumentType]
    assert len(texts) == 7 and len(held_out) == 3
    assert sorted([*texts, *held_out]) == [f"question {n}" for n in range(10)]


def test_tools_and_system_belong_to_the_prompt(tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [{"prompt": "a", "tools": tools}, {"prompt": "a", "system": "Be brief."}, {"prompt": "a"}]
    found = load_prompts(Data(write(tmp_path, rows))).train
    assert [item.tools for item in found] == [tuple(tools), None, None]
    assert [message["role"] for message in found[1].prompt] == ["system", "user"]  # pyright: ignore


def test_text_is_taken_verbatim(tmp_path: Path):
    (found,) = load_prompts(Data(write(tmp_path, [{"prompt": "Once upon"}]), format="text")).train
    assert found.prompt == "Once upon"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "unknown columns"),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "roles out of order"),
        ({"prompt": 3}, "content is not text"),
    ],
)
def test_a_row_without_a_usable_prompt_is_named(tmp_path: Path, row: dict[str, Any], reason: str):
    with pytest.raises(DataError, match=f"rows.jsonl row 2: {reason}"):
        load_prompts(Data(write(tmp_path, [{"prompt": "a"}, row])))
