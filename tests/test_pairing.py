"""Judged responses become pairs: the better one is chosen, and every prompt is accounted for."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.errors import DataError, RecipeError
from lora_dpo.judging import Pair, Response, pair, pair_file
from lora_dpo.judging.pairing import (
    CUT,
    CUT_FOR_SECOND,
    EQUAL,
    LENGTHS,
    LENGTHS_FOR_SECOND,
    MARGIN,
    TOO_FEW,
    TOO_FEW_FOR_SECOND,
    UNFINISHED,
    length_ratio,
)
from lora_dpo.preferences import load_preferences
from lora_dpo.recipe import Data, Pairing

TEXTS = st.sampled_from(["", " ", "a", " a", "b ", "c", "a b c", "d\n", "long " * 9, "e", "f", "g"])
REWARDS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e6, 1e6))


@st.composite
def judged_responses(draw: st.DrawFn) -> list[Response]:
    count = draw(st.integers(0, 8))
    return [
        Response(n, draw(TEXTS), draw(REWARDS), draw(st.integers(0, 40)), draw(st.booleans()))
        for n in range(count)
    ]


@st.composite
def pairings(draw: st.DrawFn) -> Pairing:
    return Pairing(
        strategy=draw(st.sampled_from(["best_worst", "best_second_worst", "best_random"])),
        min_margin=draw(st.sampled_from([0.0, 0.25, 1.0])),
        max_length_ratio=draw(st.sampled_from([None, 1.0, 1.5, 4.0])),
        length_slack=draw(st.sampled_from([0.0, 0.3, 10.0])),
        keep_unfinished=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def made(rewards: list[float], **changes: Any) -> Pair | str:
    """The pair of responses named r0, r1, … with these rewards, all ten tokens long."""
    return pair([Response(n, f"r{n}", r, 10) for n, r in enumerate(rewards)], "a prompt", Pairing(**changes))


def places(found: Pair | str) -> tuple[int, int]:
    assert isinstance(found, Pair), found
    return found.chosen.place, found.rejected.place


@given(judged_responses(), pairings())
@settings(max_examples=400, deadline=None)
def test_a_pair_is_two_different_texts_of_which_the_chosen_one_is_better_by_the_margin(
    responses: list[Response], pairing: Pairing
):
    found = pair(responses, "x", pairing)
    if isinstance(found, str):
        return
    assert found.chosen in responses
    assert found.rejected in responses
    assert found.chosen.text.strip() != found.rejected.text.strip()
    assert found.chosen.text.strip()
    assert found.rejected.text.strip()
    assert found.margin > 0
    assert found.chosen.reward >= found.rejected.reward + pairing.min_margin - 1e-9
    assert found.chosen.finished or pairing.keep_unfinished
    bound = pairing.max_length_ratio
    assert bound is None or length_ratio(found.chosen, found.rejected) <= bound


@given(judged_responses(), pairings(), st.randoms())
@settings(max_examples=300, deadline=None)
def test_the_order_in_which_responses_come_does_not_matter(
    responses: list[Response], pairing: Pairing, shuffler: random.Random
):
    mixed = list(responses)
    shuffler.shuffle(mixed)
    assert pair(mixed, "x", pairing) == pair(responses, "x", pairing)


@given(judged_responses(), pairings())
@settings(max_examples=300, deadline=None)
def test_a_prompt_without_a_pair_has_none(responses: list[Response], pairing: Pairing):
    """Of different texts; best_second_worst may also give up because its one candidate is too good."""
    responses = [replace(r, text=f"text {r.place}") for r in responses]
    able = [r for r in responses if r.finished or pairing.keep_unfinished]
    found = pair(responses, "x", pairing)
    if not able or pairing.strategy == "best_second_worst":
        return
    top = max(r.reward for r in able)
    best = next(r for r in able if r.reward == top)
    possible = [
        r
        for r in responses
        if (pairing.max_length_ratio is None or length_ratio(best, r) <= pairing.max_length_ratio)
        and top - r.reward > 0
        and top - r.reward >= pairing.min_margin
    ]
    assert isinstance(found, Pair) == bool(possible)


def test_the_strategies_by_hand():
    rewards = [0.3, 0.9, 0.1, 0.5]
    assert places(made(rewards)) == (1, 2)
    assert places(made(rewards, strategy="best_second_worst")) == (1, 0)
    drawn = {places(made(rewards, strategy="best_random", seed=seed)) for seed in range(40)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}


def test_ties_go_to_the_first_of_the_best_and_the_last_of_the_worst():
    assert places(made([1.0, 0.0, 1.0, 0.0])) == (0, 3)


def test_the_random_choice_keeps_to_the_margin_and_differs_between_prompts():
    rewards = [1.0, 0.9, 0.2, 0.1]
    responses = [Response(n, f"r{n}", r, 10) for n, r in enumerate(rewards)]
    pairing = Pairing(strategy="best_random", min_margin=0.5)
    drawn = [places(pair(responses, f"prompt {n}", pairing)) for n in range(40)]
    assert set(drawn) == {(0, 2), (0, 3)}


@pytest.mark.parametrize(
    ("rewards", "changes", "reason"),
    [
        ([1.0], {}, TOO_FEW),
        ([0.5, 0.5], {}, EQUAL),
        ([0.5, 0.4], {"min_margin": 0.2}, MARGIN),
        ([0.5, 0.4], {"strategy": "best_second_worst"}, TOO_FEW_FOR_SECOND),
        ([0.5, 0.5, 0.1], {"strategy": "best_second_worst"}, MARGIN),
    ],
)
def test_why_there_is_no_pair(rewards: list[float], changes: dict[str, Any], reason: str):
    assert made(rewards, **changes) == reason


def test_equal_texts_are_one_response():
    same = [Response(0, "yes", 1.0, 5), Response(1, " yes\n", 0.0, 5)]
    assert pair(same, "x", Pairing()) == TOO_FEW
    found = pair([*same, Response(2, "no", 0.5, 5)], "x", Pairing())
    assert places(found) == (0, 2)


def test_an_unfinished_response_is_not_chosen_unless_it_may_be():
    responses = [
        Response(0, "cut", 1.0, 5, finished=False),
        Response(1, "b", 0.5, 5),
        Response(2, "c", 0.1, 5),
    ]
    assert places(pair(responses, "x", Pairing())) == (1, 2)
    assert places(pair(responses, "x", Pairing(keep_unfinished=True))) == (0, 2)
    cut = [Response(n, f"cut {n}", float(n), 5, finished=False) for n in range(3)]
    assert pair(cut, "x", Pairing()) == UNFINISHED


def test_of_equal_texts_the_one_that_ended_by_itself_counts():
    cut, ended = Response(0, "yes", 0.9, 5, finished=False), Response(1, "yes ", 0.8, 5)
    worse = Response(2, "no", 0.1, 5)
    found = pair([cut, ended, worse], "x", Pairing())
    assert isinstance(found, Pair) and found.chosen is ended and found.rejected is worse
    found = pair([cut, ended, replace(worse, reward=2.0)], "x", Pairing())
    assert isinstance(found, Pair) and found.rejected is ended


def test_a_better_response_that_did_not_end_is_neither_chosen_nor_the_second_worst():
    cut = Response(0, "cut", 5.0, 5, finished=False)
    chosen, low, lower = Response(1, "b", 3.0, 5), Response(2, "c", 1.0, 5), Response(3, "d", 0.0, 5)
    for strategy in ("best_worst", "best_second_worst", "best_random"):
        assert pair([cut, chosen], "x", Pairing(strategy=strategy)) == CUT
    second = Pairing(strategy="best_second_worst")
    assert pair([cut, chosen, low], "x", second) == CUT_FOR_SECOND
    assert places(pair([cut, chosen, low, lower], "x", second)) == (1, 2)
    assert places(pair([cut, chosen, low], "x", replace(second, keep_unfinished=True))) == (0, 1)


def test_a_second_worst_that_is_missing_for_its_length_is_said_to_be():
    responses = [Response(0, "a", 1.0, 10), Response(1, "b", 0.0, 31), Response(2, "c", 0.5, 15)]
    second = Pairing(strategy="best_second_worst", max_length_ratio=3)
    assert pair(responses, "x", second) == LENGTHS_FOR_SECOND
    assert places(pair(responses, "x", replace(second, max_length_ratio=4))) == (0, 2)


def test_a_bound_on_the_length_ratio_leaves_out_what_is_too_long_or_short():
    responses = [Response(0, "a", 1.0, 10), Response(1, "b", 0.0, 31), Response(2, "c", 0.5, 15)]
    assert places(pair(responses, "x", Pairing())) == (0, 1)
    assert places(pair(responses, "x", Pairing(max_length_ratio=3))) == (0, 2)
    assert pair(responses, "x", Pairing(max_length_ratio=1.2)) == LENGTHS


def test_within_the_slack_the_nearest_in_length_is_rejected():
    responses = [Response(0, "a", 1.0, 10), Response(1, "b", 0.0, 40), Response(2, "c", 0.1, 12)]
    assert places(pair(responses, "x", Pairing(length_slack=0.05))) == (0, 1)
    assert places(pair(responses, "x", Pairing(length_slack=0.2))) == (0, 2)


def test_options_out_of_bounds_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"pairing\.max_length_ratio got 0\.5"):
        Pairing(max_length_ratio=0.5)
    with pytest.raises(RecipeError, match=r"pairing\.strategy got 'best'"):
        Pairing(strategy="best")  # pyright: ignore[reportArgumentType]


def judged_line(name: str, scores: list[float], **more: Any) -> dict[str, Any]:
    responses = [
        {"text": f"answer {n}", "tokens": 2 + n, "finished": True, "score": score}
        for n, score in enumerate(scores)
    ]
    prompt = [{"role": "user", "content": f"question {name}"}]
    return {"id": name, "prompt": prompt, "responses": responses, "sampler": "s", "judge": "j:1", **more}


def write(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_prompt_is_a_pair_or_counted_by_reason(tmp_path: Path):
    lines = [
        judged_line("a", [0.0, 1.0]),
        judged_line("b", [1.0, 1.0]),
        judged_line("c", [1.0]),
        judged_line("d", [3.0, 1.0, 2.0]),
    ]
    found = pair_file(write(tmp_path / "judged.jsonl", lines), tmp_path / "pairs.jsonl", Pairing(), round=2)
    assert (found.prompts, found.pairs, dict(found.reasons)) == (4, 2, {EQUAL: 1, TOO_FEW: 1})
    assert found.pairs + found.reasons.total() == found.prompts
    assert (found.margin, found.chosen_tokens, found.rejected_tokens) == (1.5, 2.5, 2.5)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0] == {
        "prompt": [{"role": "user", "content": "question a"}],
        "chosen": "answer 1",
        "rejected": "answer 0",
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "margin": 1.0,
        "id": "a",
        "sampler": "s",
        "judge": "j:1",
        "round": 2,
    }
    assert pairs[1]["margin"] == 2.0


def test_judged_files_and_pairs_files_are_ordinary_preference_files(tmp_path: Path):
    kwargs = {"enable_thinking": False}
    lines = [judged_line("a", [0.0, 1.0], chat_template_kwargs=kwargs), judged_line("b", [1.0, 0.5, 0.0])]
    judged, pairs = write(tmp_path / "judged.jsonl", lines), tmp_path / "pairs.jsonl"
    pair_file(judged, pairs, Pairing())
    for file in (judged, pairs):
        rows = load_preferences(Data(str(file))).train
        assert [row.chosen[0]["content"] for row in rows] == ["answer 1", "answer 0"]  # pyright: ignore
        assert [row.rejected[0]["content"] for row in rows] == ["answer 0", "answer 2"]  # pyright: ignore
        assert rows[0].template_kwargs == kwargs
    assert [row.values for row in load_preferences(Data(str(pairs))).train] == [{"margin": 1.0}] * 2


def test_a_file_that_gives_no_pair_leaves_the_one_that_was_there(tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("before\n")
    with pytest.raises(DataError, match=r"no prompt gives a pair.*all rewards are equal"):
        pair_file(write(tmp_path / "judged.jsonl", [judged_line("a", [1.0, 1.0])]), pairs, Pairing())
    assert pairs.read_text() == "before\n"


def test_pairs_are_not_written_over_what_they_are_made_from(tmp_path: Path):
    judged = write(tmp_path / "judged.jsonl", [judged_line("a", [1.0, 0.0])])
    before = judged.read_bytes()
    with pytest.raises(DataError, match="the judged file itself"):
        pair_file(judged, tmp_path / "." / "judged.jsonl", Pairing())
    assert judged.read_bytes() == before


def test_samples_that_are_not_judged_are_refused_with_file_and_row(tmp_path: Path):
    line = judged_line("a", [1.0, 0.0])
    del line["responses"][1]["score"]
    judged = write(tmp_path / "judged.jsonl", [judged_line("b", [1.0, 0.0]), line])
    with pytest.raises(DataError, match=r"judged\.jsonl row 2: a response has no score"):
        pair_file(judged, tmp_path / "pairs.jsonl", Pairing())
