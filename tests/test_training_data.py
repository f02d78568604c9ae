"""From what an objective declares to examples, and what counts as other data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from builders import (
    float64_model,
    float64_throughout,
    llama_config,
    random_branches,
    single_sequence_logprobs,
    small_tokenizer,
)

from lora_dpo.batching import pack
from lora_dpo.errors import RecipeError
from lora_dpo.finished import _distinct_prompts, _preferred
from lora_dpo.logprobs import token_logprobs
from lora_dpo.losses import DPO, SFT, LogProbs, Loss, Objective
from lora_dpo.preferences import Rating, Where
from lora_dpo.recipe import Data
from lora_dpo.tokenization import share
from lora_dpo.training import Display, prepare_data, prepare_held_out
from lora_dpo.training.checkpoint import data_fingerprint


@dataclass(frozen=True)
class Rated(Objective):
    """An objective of ratings."""

    records: ClassVar[Any] = "ratings"
    sides: ClassVar[tuple[str, ...]] = ("completion", "mismatched")

    def __call__(self, logprobs: LogProbs) -> Loss:
        return Loss(logprobs.log_ratio.sum(dim=1))


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Six pairs in a file."""
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"the cat {n}", "chosen": f"sat {n}", "rejected": f"ate {n}", "weight": n}
        for n in range(6)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


Prepare = Callable[..., Any]


@pytest.fixture
def prepare(pairs: str) -> Prepare:
    def prepare(objective: Any, **data: Any) -> Any:
        made = Data(pairs, **data)
        return prepare_data(made, objective, small_tokenizer(), seed=0, display=Display())

    return prepare


@pytest.mark.parametrize(
    ("objective", "examples", "sides", "names"),
    [
        (DPO(), 6, 2, {"weight"}),
        (SFT(), 6, 1, set()),
        (Rated(), 12, 2, {"weight", "desirable"}),
    ],
)
def test_an_objective_gets_the_records_that_it_declares(
    prepare: Prepare, objective: Any, examples: int, sides: int, names: set[str]
):
    data = prepare(objective)
    assert len(data.train) == examples
    assert {(item.sides, *sorted(item.values)) for item in data.train} == {(sides, *sorted(names))}


def test_the_same_data_again_come_from_the_cache_with_their_values(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
):
    first, again = (prepare(Rated(), eval_last=2) for _ in range(2))
    assert "tokenized before" in capsys.readouterr().out
    for part in ("train", "eval"):
        (one, other) = (getattr(data, part) for data in (first, again))
        assert [item.values for item in one] == [item.values for item in other]
        assert [item.key for item in one] == [item.key for item in other]


def test_packed_ratings_have_the_log_probs_of_one_sequence_at_a_time_also_where_responses_are_alike(
    prepare: Prepare,
):
    items = prepare(Rated()).train
    prefix, mask = items[0].side(0), items[0].scored[0]
    items.append(share([prefix, prefix], [mask, mask], items[0].where, items[0].values))
    assert [len(rest) for rest in items[-1].rests] == [0, 0]
    with float64_throughout(), torch.no_grad():
        model = float64_model(llama_config(vocab_size=320))
        expected = torch.stack([single_sequence_logprobs(model, item) for item in items])
        weights = []
        for batch in pack(items, 60):
            found = batch.per_sequence(token_logprobs(model, batch))
            assert torch.allclose(found, expected[list(batch.examples)], rtol=1e-9, atol=1e-9)
            weights += zip(batch.examples, batch.values["weight"].tolist(), strict=True)
    assert [weight for _, weight in sorted(weights)] == [*(n // 2 for n in range(12)), 0]


def test_how_many_of_each_kind_there_are_is_said_for_ratings_only(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
):
    prepare(Rated(), eval_last=2)
    assert "ratings: 4 desirable, 4 undesirable\n" in capsys.readouterr().out
    prepare(DPO())
    assert "ratings:" not in capsys.readouterr().out


def test_held_out_ratings_are_read_as_ratings(pairs: str):
    data = Data(pairs, eval_last=2)
    found = prepare_held_out(data, Rated(), small_tokenizer(), seed=0, display=Display(quiet=True))
    labels = [isinstance(record, Rating) and record.desirable for record in found.records]
    assert labels == [True, False, True, False]
    assert len(found.eval) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"records": "triples"}, "Odd.records is 'triples'; it takes one of pairs, demonstrations, ratings"),
        ({"sides": ("completion",)}, r"Odd.sides names 1 \(completion\); examples of ratings have 2"),
        ({"records": "demonstrations"}, "examples of demonstrations have 1"),
    ],
)
def test_an_objective_that_declares_what_there_is_not_is_refused(
    prepare: Prepare, changes: dict[str, Any], says: str
):
    with pytest.raises(RecipeError, match=says):
        prepare(type("Odd", (Rated,), changes)())


def test_side_by_side_shows_the_answer_that_ratings_prefer_if_there_is_one():
    def rating(prompt: str, response: str, desirable: bool) -> Rating:
        return Rating(prompt, response, desirable, Where("a", 1))

    records = [rating("p", "good", True), rating("p", "bad", False), rating("q", "worse", False)]
    found = _distinct_prompts(records)
    assert [(record.prompt, _preferred(record)) for record in found] == [("p", "good"), ("q", "")]


def test_other_values_are_other_data():
    item = random_branches(np.random.default_rng(0), 4, (2, 3))
    given = [{}, {"weight": 1.0}, {"weight": 2.0}, {"margin": 1.0}, {"weight": 1.0, "margin": 0.0}]
    prints = [data_fingerprint([replace(item, values=values)]) for values in given]
    assert len(set(prints)) == len(given)
    assert data_fingerprint([replace(item, values={"margin": 0.0, "weight": 1.0})]) == prints[-1]
    assert data_fingerprint([item, replace(item, values={"weight": 1.0})]) != data_fingerprint(
        [replace(item, values={"weight": 1.0}), item]
    )
