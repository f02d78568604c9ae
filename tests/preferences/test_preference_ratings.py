"""Thumbs up and down: each layout gives the ratings written here, and each rating another one's response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.errors import DataError
from lora_dpo.preferences import (
    BadRowError,
    Loaded,
    Rating,
    Where,
    describe_ratings,
    load_demonstrations,
    load_preferences,
    load_ratings,
)
from lora_dpo.preferences.mismatched import with_mismatched
from lora_dpo.recipe import Data

HI = {"role": "user", "content": "hi"}
WHY = {"role": "user", "content": "why"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SAID = "\n\nHuman: hi\n\nAssistant:"
OTHER = {"prompt": "other", "completion": "another", "label": True}

RowsFile = Callable[[list[Any]], str]
RatingsOf = Callable[..., list[tuple[Any, Any, bool]]]


@pytest.fixture
def loaded(rows_file: RowsFile) -> Callable[..., Loaded[Rating]]:
    return lambda rows, **data: load_ratings(Data(rows_file(rows), **data))


@pytest.fixture
def ratings_of(loaded: Callable[..., Loaded[Rating]]) -> RatingsOf:
    """(prompt, response, desirable) of a row's ratings; another row stands behind it."""

    def load(row: dict[str, Any], **data: Any) -> list[tuple[Any, Any, bool]]:
        *found, _ = loaded([row, OTHER], **data).train
        return [(record.prompt, record.response, record.desirable) for record in found]

    return load


SAME_RATING = {
    "strings": {"prompt": "hi", "completion": "yes", "label": True},
    "messages": {"prompt": [HI], "completion": [YES], "label": True},
    "prompt messages, completion text": {"prompt": [HI], "completion": "yes", "label": True},
    "another name of the completion": {"prompt": "hi", "response": "yes", "label": True},
    "HH prompt": {"prompt": SAID, "completion": " yes", "label": True},
    "conversation": {"messages": [HI, YES], "label": True},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
        "label": True,
    },
    "Alpaca": {"instruction": "hi", "input": "", "output": "yes", "label": True},
    "question": {"question": "hi", "answer": "yes", "label": True},
    "other columns": {"prompt": "hi", "completion": "yes", "label": True, "id": 3, "rejected": None},
}


@pytest.mark.parametrize("name", SAME_RATING)
def test_every_layout_of_one_rating_gives_the_same_record(ratings_of: RatingsOf, name: str) -> None:
    assert ratings_of(SAME_RATING[name]) == [((HI,), (YES,), True)]


LABELS = [
    *(
        (True, value)
        for value in (True, 1, 1.0, "true", "True", "1", "thumbs_up", "Thumbs-Up", " up ", "good")
    ),
    *((False, value) for value in (False, 0, 0.0, "FALSE", "0", "thumbs down", "undesirable", "\U0001f44e")),
]


@pytest.mark.parametrize(("desirable", "label"), LABELS)
def test_labels_are_truth_values_numbers_or_words(ratings_of: RatingsOf, desirable: bool, label: Any) -> None:
    assert ratings_of({"prompt": "hi", "completion": "yes", "label": label}) == [((HI,), (YES,), desirable)]


def test_a_label_rates_the_last_response_of_a_conversation(ratings_of: RatingsOf) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get"}}]}
    found = {"role": "tool", "content": "12"}
    turns = [HI, NO, WHY, call, found, YES]
    assert ratings_of({"messages": turns, "label": 0}) == [((HI, NO, WHY), (call, found, YES), False)]


PAIRS = {
    "strings": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "conversations": {"chosen": [HI, YES], "rejected": [HI, NO]},
    "UltraFeedback": {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO], "messages": [HI, YES]},
    "a label that says nothing": {"prompt": "hi", "chosen": "yes", "rejected": "no", "label": 0},
    "scored": {"prompt": "hi", "responses": ["so", "yes", "no"], "scores": [2, 3, 1]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_a_rating_of_each_kind(ratings_of: RatingsOf, name: str) -> None:
    assert ratings_of(PAIRS[name]) == [((HI,), (YES,), True), ((HI,), (NO,), False)]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "p", "completion": " a", "label": 1}, [("p", " a", True)]),
        ({"text": "whole", "label": "down"}, [("", "whole", False)]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, [("p", "a", True), ("p", "b", False)]),
    ],
)
def test_rendered_text_is_rated_verbatim(
    ratings_of: RatingsOf, row: dict[str, Any], found: list[Any]
) -> None:
    assert ratings_of(row, format="text") == found


GOOD = {"prompt": "hi", "completion": "yes", "label": True}
BAD = [
    ("missing label", {"prompt": "hi", "completion": "yes"}),
    ("missing label", {"messages": [HI, YES]}),
    ("missing label", {"prompt": "hi", "completion": "yes", "label": None}),
    ("unknown label", {**GOOD, "label": "maybe"}),
    ("unknown label", {**GOOD, "label": 2}),
    ("unknown label", {**GOOD, "label": -1}),
    ("unknown label", {**GOOD, "label": 0.5}),
    ("unknown label", {**GOOD, "label": ""}),
    ("unknown label", {**GOOD, "label": [True]}),
    ("unknown label", {**GOOD, "label": float("nan")}),
    ("unknown columns", {"prompt": "hi", "label": True}),
    ("unknown columns", {"label": True}),
    ("missing rejected", {"prompt": "hi", "chosen": "yes"}),
    ("identical sides", {"prompt": "hi", "chosen": "yes", "rejected": "yes"}),
    ("empty response", {**GOOD, "completion": " "}),
    ("empty prompt", {**GOOD, "prompt": ""}),
    ("roles out of order", {"messages": [HI, YES, WHY], "label": True}),
    ("roles out of order", {"messages": [YES], "label": True}),
    ("content is not text", {**GOOD, "completion": 3}),
    ("weight is not a finite number", {**GOOD, "weight": "heavy"}),
    ("weight is negative", {**GOOD, "weight": -1}),
]


@pytest.mark.parametrize(("reason", "row"), BAD, ids=[f"{reason}-{n}" for n, (reason, _) in enumerate(BAD)])
def test_a_bad_rating_is_refused_with_its_row_and_reason(
    loaded: Callable[..., Loaded[Rating]], reason: str, row: dict[str, Any]
) -> None:
    with pytest.raises(BadRowError) as caught:
        loaded([GOOD, row, OTHER])
    assert (caught.value.row, caught.value.reason) == (2, reason)
    rest = loaded([GOOD, row, OTHER], on_bad_row="skip")
    assert (len(rest.train), rest.skipped) == (2, {reason: 1})


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("missing label", {"prompt": "p", "completion": "a"}),
        ("unknown label", {"prompt": "p", "completion": "a", "label": "so-so"}),
        ("missing response", {"prompt": "p", "label": True}),
        ("content is not text", {"prompt": "p", "completion": [YES], "label": True}),
        ("identical sides", {"prompt": "p", "chosen": "a", "rejected": "a"}),
    ],
)
def test_bad_rated_text_is_refused(
    loaded: Callable[..., Loaded[Rating]], reason: str, row: dict[str, Any]
) -> None:
    with pytest.raises(BadRowError, match=f"row 1: {reason}"):
        loaded([row], format="text")


def test_both_ratings_of_a_bad_pair_are_one_skipped_row(loaded: Callable[..., Loaded[Rating]]) -> None:
    rest = loaded([{**PAIRS["strings"], "rejected": ""}, PAIRS["strings"]], on_bad_row="skip")
    assert (len(rest.train), rest.skipped) == (2, {"empty response": 1})


# Weights and margins


def pair_values(rows_file: RowsFile, **columns: Any) -> Any:
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no", **columns}
    loaded = [load_preferences(Data(rows_file([row]), format=form)).train for form in ("auto", "text")]
    ((chat,), (text,)) = loaded
    assert chat.values == text.values
    return chat.values


def test_weight_and_margin_of_a_pair_are_its_values(rows_file: RowsFile) -> None:
    assert pair_values(rows_file) == {}
    assert pair_values(rows_file, weight=0, margin=-1.5) == {"weight": 0.0, "margin": -1.5}
    assert pair_values(rows_file, weight="0.25", margin="") == {"weight": 0.25}
    assert pair_values(rows_file, margin=None, weight=3) == {"weight": 3.0}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        *(({"weight": value}, "weight is not a finite number") for value in ("x", True, [1], float("inf"))),
        *(({"margin": value}, "margin is not a finite number") for value in ("nan", float("nan"), 10**400)),
        ({"weight": -0.1}, "weight is negative"),
    ],
)
def test_a_weight_or_margin_that_cannot_be_used_is_refused(
    rows_file: RowsFile, columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRowError, match=f"row 1: {reason}"):
        pair_values(rows_file, **columns)


def test_ratings_have_their_weight_and_desirability_as_values(loaded: Callable[..., Loaded[Rating]]) -> None:
    rows = [
        {**GOOD, "weight": 2, "margin": "ignored"},
        {**OTHER, "label": 0},
        {**PAIRS["strings"], "weight": 3},
    ]
    assert [record.values for record in loaded(rows).train] == [
        {"weight": 2.0, "desirable": 1.0},
        {"desirable": 0.0},
        {"weight": 3.0, "desirable": 1.0},
        {"weight": 3.0, "desirable": 0.0},
    ]


def test_demonstrations_take_no_values(rows_file: RowsFile) -> None:
    (record,) = load_demonstrations(Data(rows_file([{**GOOD, "weight": "any"}]))).train
    assert record.values == {}


def test_the_counts_of_both_kinds_are_told(
    loaded: Callable[..., Loaded[Rating]], rows_file: RowsFile
) -> None:
    rows = [GOOD, OTHER, {**OTHER, "label": False}]
    assert describe_ratings(loaded(rows).train) == ["ratings: 2 desirable, 1 undesirable"]
    pairs = load_preferences(Data(rows_file([PAIRS["strings"]])))
    assert describe_ratings(pairs.train) == []


# Mismatched responses


def rating(prompt: str, response: str, row: int = 1, desirable: bool = True) -> Rating:
    ask, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    return Rating((ask,), (answer,), desirable, Where("a", row))


def text(messages: Any) -> str:
    return messages[0]["content"]


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("abc")), min_size=2, max_size=12),
)
def test_a_mismatched_response_is_another_one_s_and_answers_another_prompt_where_there_is_one(
    drawn: list[tuple[str, str]],
) -> None:
    records = [rating(prompt, response, row) for row, (prompt, response) in enumerate(drawn)]
    for record, (prompt, response) in zip(with_mismatched(records), drawn, strict=True):
        found = text(record.mismatched)
        rest = [other for other in drawn if other[1] != response]
        if any(other[0] != prompt for other in rest):
            assert found in {other[1] for other in rest if other[0] != prompt}
        elif rest:
            assert found in {other[1] for other in rest}
        else:
            assert found == response


def test_distinct_responses_are_each_taken_once_round_a_circle() -> None:
    records = [rating(f"p{n}", f"a{n}", n) for n in range(50)]
    taken = [int(text(record.mismatched)[1:]) for record in with_mismatched(records)]
    assert sorted(taken) == list(range(50))
    place, seen = 0, []
    for _ in range(50):
        place = taken[place]
        seen.append(place)
    assert sorted(seen) == list(range(50)), "one circle through all of them"


def test_mismatched_responses_are_of_both_kinds_as_the_rated_ones_are() -> None:
    records = [
        rating(f"p{n}", f"{side} {n}", n, side == "good") for n in range(500) for side in ("good", "bad")
    ]
    kinds = Counter(text(record.mismatched).split()[0] for record in with_mismatched(records))
    assert abs(kinds["good"] - kinds["bad"]) <= 10


def test_few_responses_among_many_alike_are_still_found() -> None:
    records = [rating(f"p{n}", "a", n) for n in range(2000)] + [rating("p", "b")]
    *alike, other = with_mismatched(records)
    assert {text(record.mismatched) for record in alike} == {"b"}
    assert text(other.mismatched) == "a"


def test_mismatched_responses_do_not_depend_on_the_seed_and_stay_in_their_set(rows_file: RowsFile) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"a{n}", "label": n % 2} for n in range(20)]
    held_out = [{"prompt": f"q{n}", "completion": f"b{n}", "label": n % 2} for n in range(5)]
    data = Data(rows_file(rows), eval=rows_file(held_out))
    first, second = (load_ratings(data, seed=seed) for seed in (0, 1))
    assert first == second
    assert {text(record.mismatched)[0] for record in first.train} == {"a"}
    assert {text(record.mismatched)[0] for record in first.eval} == {"b"}


@pytest.mark.parametrize("name", ["training", "evaluation"])
def test_a_single_rating_is_refused(
    loaded: Callable[..., Loaded[Rating]], rows_file: RowsFile, name: str
) -> None:
    rows = [GOOD] if name == "training" else [GOOD, OTHER, {**OTHER, "prompt": "third"}]
    data = {} if name == "training" else {"eval_last": 1}
    with pytest.raises(DataError, match=rf"row {len(rows)} is the only rating for {name}: KTO"):
        loaded(rows, **data)


def test_ratings_are_split_by_prompt(loaded: Callable[..., Loaded[Rating]]) -> None:
    rows = [{"prompt": f"p{n % 4}", "completion": f"a{n}", "label": n % 3 == 0} for n in range(12)]
    found = loaded(rows, eval_fraction=0.25)
    assert (len(found.train), len(found.eval)) == (9, 3)
    assert len({str(record.prompt) for record in found.eval}) == 1
