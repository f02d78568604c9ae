"""The embedded data keep their promises, and the tour goes from nothing to two exports."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lora_dpo.quickstart import BaseSettings, cache_folder, satisfies, tour
from lora_dpo.quickstart.data import demonstrations, preference_rows
from lora_dpo.recipe import load_recipe, override

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.py"


def test_the_rule_takes_the_chosen_and_refuses_the_rejected_of_every_pair():
    train, held_out = preference_rows(0, 400, 200)
    for row in [*train, *held_out]:
        assert satisfies(row["prompt"], row["chosen"]), row
        assert not satisfies(row["prompt"], row["rejected"]), row


def test_a_wrong_an_empty_and_a_long_answer_break_the_rule():
    ask = "What is the capital of France?"
    assert satisfies(ask, "The capital of France is Paris.")
    assert not satisfies(ask, "The capital of France is Rome.")
    assert not satisfies(ask, "")
    assert not satisfies(ask, "Paris. " * 10)


def test_held_out_prompts_are_in_no_demonstration_and_no_training_pair():
    train, held_out = preference_rows(3, 500, 200)
    seen = {row["prompt"] for row in train} | {d["messages"][0]["content"] for d in demonstrations(3, 3000)}
    assert not seen & {row["prompt"] for row in held_out}


def test_the_seed_decides_the_rows():
    assert preference_rows(1, 50, 20) == preference_rows(1, 50, 20)
    assert preference_rows(1, 50, 20) != preference_rows(2, 50, 20)
    assert demonstrations(1, 50) == demonstrations(1, 50)


def test_most_demonstrations_ramble():
    rows = demonstrations(0, 500)
    short = sum(satisfies(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows)
    assert 0.2 < short / len(rows) < 0.5


def test_the_tour_goes_the_whole_way_and_uses_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A hundredth of the work, so that it ends in seconds; its figures are those of a model that knows
    nothing. And not one socket to another machine is asked for, though nothing says offline.
    """
    asked = no_network(monkeypatch)
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    settings = BaseSettings(
        demonstrations=64, width=64, layers=1, heads=1, mlp=64, preferences=24, held_out=8
    )
    folder = cache_folder(settings)
    words = [f"base.model={folder / 'base'}", f"data.train={folder / 'train.jsonl'}"]
    words += [
        f"data.eval={folder / 'eval.jsonl'}",
        f"run_directory={tmp_path / 'run'}",
        "training.eval_every=0",
    ]
    recipe = override(load_recipe(RECIPE), words)
    result = tour(recipe, settings=settings)
    run = tmp_path / "run"
    assert (run / "export-adapter" / "adapter_model.safetensors").is_file()
    assert (run / "export-merged" / "model.safetensors").is_file()
    assert json.loads((run / "quickstart.json").read_text())["accuracy"] == result.accuracy
    made = (folder / "base" / "model.safetensors").stat().st_mtime_ns
    again = tour(recipe, settings=settings)
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns == made
    assert (tmp_path / "run-2" / "quickstart.json").is_file(), "a second run gets a folder of its own"
    assert replace(again, seconds=0) == replace(result, seconds=0)
    assert "Everything lies in" in capsys.readouterr().out
    assert asked == []
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))
    assert asked, "the block itself works"


def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Refuse every connection and look-up of a name but those inside this machine; gives what was asked for.

    Sockets between processes (AF_UNIX) stay: torch and the forks of a tokenizer may use them.
    """
    asked: list[object] = []

    def refuse(address: object) -> NoReturn:
        asked.append(address)
        raise OSError(f"no network: {address!r}")

    class Blocked(socket.socket):
        def connect(self, address: Any) -> None:
            if self.family != socket.AF_UNIX:
                refuse(address)
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            if self.family != socket.AF_UNIX:
                refuse(address)
            return super().connect_ex(address)

    monkeypatch.setattr(socket, "socket", Blocked)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(address))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked
