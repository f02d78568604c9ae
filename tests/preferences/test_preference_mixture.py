"""Weights, caps and splits: what is trained on, what is held out, and that neither leaks into the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.errors import DataError, RecipeError
from lora_dpo.preferences import (
    Loaded,
    Preference,
    describe_skipped,
    load_demonstrations,
    load_preferences,
)
from lora_dpo.recipe import Data, Source

RowsFile = Callable[[list[Any]], str]
Load = Callable[..., Loaded[Preference]]
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def rows(*prompts: object) -> list[dict[str, Any]]:
    return [{"prompt": f"p{p}", "chosen": f"a{n}", "rejected": "b"} for n, p in enumerate(prompts)]


@pytest.fixture(scope="session")
def load(rows_file: RowsFile) -> Load:
    """Loads lists of rows as files; a `weight` is that of all training sources."""

    def file_of(given: Any) -> Any:
        return tuple(map(file_of, given)) if isinstance(given, tuple) else rows_file(given)

    def load(train: Any, seed: int = 0, weight: float | None = None, **data: Any) -> Loaded[Preference]:
        if "eval" in data:
            data["eval"] = file_of(data["eval"])
        files = file_of(train)
        return load_preferences(Data(Source(files, weight) if weight else files, **data), seed=seed)

    return load


def answers(records: list[Preference]) -> list[str]:
    return [record.chosen[0]["content"] for record in records if not isinstance(record.chosen, str)]


def prompts(records: list[Preference]) -> set[str]:
    return {record.prompt[0]["content"] for record in records if not isinstance(record.prompt, str)}


@EXAMPLES
@given(count=st.integers(1, 30), weight=st.floats(0.05, 4), seed=st.integers(0, 3))
def test_each_row_is_met_as_often_as_its_weight_says(
    load: Load, count: int, weight: float, seed: int
) -> None:
    expected = int(weight) * count + round((weight - int(weight)) * count)
    if expected == 0:
        with pytest.raises(DataError, match="no usable row"):
            load(rows(*range(count)), seed, weight)
        return
    met = Counter(answers(load(rows(*range(count)), seed, weight).train))
    assert met.total() == expected
    assert set(met.values()) <= {math.floor(weight), math.ceil(weight)}


def test_half_of_the_rows_depends_on_the_seed_and_nothing_else(load: Load) -> None:
    halves = [tuple(answers(load(rows(*range(40)), seed, 0.5).train)) for seed in (0, 0, 1, 2)]
    assert halves[0] == halves[1]
    assert len(set(halves)) == 3


def test_sources_follow_each_other_in_their_order(load: Load) -> None:
    loaded = load((rows(1, 2), rows(3)), weight=None)
    assert [r.prompt[0]["content"] for r in loaded.train] == ["p1", "p2", "p3"]  # type: ignore[index]


def test_caps_take_a_random_sample_in_order(load: Load) -> None:
    loaded = load(rows(*range(100)), eval=rows(*range(200, 250)), max_rows=10, max_eval_rows=5)
    assert (len(loaded.train), len(loaded.eval)) == (10, 5)
    numbers = [record.where.row for record in loaded.train]
    assert numbers == sorted(set(numbers))
    assert max(numbers) > 10


@EXAMPLES
@given(
    drawn=st.lists(st.integers(0, 9), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
    weight=st.sampled_from([0.5, 1.0, 2.5]),
)
def test_a_fraction_of_the_prompts_is_held_out_and_none_leaks(
    load: Load, drawn: list[int], fraction: float, seed: int, weight: float
) -> None:
    distinct = len(set(drawn))
    held_out = max(1, round(fraction * distinct))
    try:
        loaded = load(rows(*drawn), seed, weight, eval_fraction=fraction)
    except DataError:
        assert held_out == distinct or weight == 0.5
        return
    assert not prompts(loaded.train) & prompts(loaded.eval)
    assert len(prompts(loaded.eval)) == held_out
    assert loaded.leaked == 0
    if weight == 1.0:
        assert len(loaded.train) + len(loaded.eval) == len(drawn)


def test_the_held_out_prompts_do_not_depend_on_the_order_of_the_rows(load: Load) -> None:
    forward = load(rows(*range(30)), eval_fraction=0.2)
    backward = load(rows(*reversed(range(30))), eval_fraction=0.2)
    assert prompts(forward.eval) == prompts(backward.eval)
    assert prompts(forward.eval) != prompts(load(rows(*range(30)), 1, eval_fraction=0.2).eval)


@EXAMPLES
@given(
    train=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    held_out=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_training_rows_with_a_held_out_prompt_are_dropped_and_counted(
    load: Load, train: list[int], held_out: list[int]
) -> None:
    leaks = sum(prompt in held_out for prompt in train)
    if leaks == len(train):
        with pytest.raises(DataError, match=r"no usable row is left for training: .* in the evaluation set"):
            load(rows(*train), eval=rows(*held_out))
        return
    loaded = load(rows(*train), eval=rows(*held_out), max_eval_rows=1)
    assert len(loaded.train) == len(train) - leaks
    assert not prompts(loaded.train) & {f"p{prompt}" for prompt in held_out}
    assert loaded.leaked == leaks


def test_prompts_are_equal_whatever_the_layout_and_the_order_of_the_keys(load: Load) -> None:
    train = [
        {"prompt": [{"content": "hi", "role": "user"}], "chosen": "a", "rejected": "b"},
        {"instruction": "hi", "chosen": "c", "rejected": "d"},
        {"prompt": "other", "chosen": "a", "rejected": "b"},
    ]
    loaded = load(train, eval=[{"prompt": "hi", "chosen": "e", "rejected": "f"}])
    assert prompts(loaded.train) == {"other"}
    assert describe_skipped(loaded) == ["2 rows dropped from training: the prompt is in the evaluation set"]


def test_the_last_rows_as_read_are_held_out(load: Load) -> None:
    given_rows = rows(1, 2, 3, 4, 5, 2)
    given_rows[4]["chosen"] = ""
    loaded = load(given_rows, eval_last=3, on_bad_row="skip")
    assert prompts(loaded.eval) == {"p4", "p2"}
    assert prompts(loaded.train) == {"p1", "p3"}
    assert loaded.leaked == 1
    assert loaded.skipped == {"empty response": 1}


def test_whole_texts_without_prompts_are_split_like_prompts(rows_file: Callable[[list[Any]], str]) -> None:
    texts = [{"chosen": f"a{n}", "rejected": "b"} for n in (1, 1, 2, 3, 4)]
    loaded = load_preferences(Data(rows_file(texts), format="text", eval_fraction=0.5))
    train, held_out = ({record.chosen for record in side} for side in (loaded.train, loaded.eval))
    assert (len(held_out), len(train), train & held_out) == (2, 2, set())


def test_demonstrations_are_split_by_prompt_too(rows_file: Callable[[list[Any]], str]) -> None:
    given_rows = [{"prompt": f"p{n % 4}", "completion": f"a{n}"} for n in range(12)]
    loaded = load_demonstrations(Data(rows_file(given_rows), eval_fraction=0.25))
    assert (len(loaded.train), len(loaded.eval)) == (9, 3)
    assert len({str(record.prompt) for record in loaded.eval}) == 1


@pytest.mark.parametrize(
    ("train", "data", "named"),
    [
        ((), {}, r"data\.train names no source"),
        ((rows(1), rows(2)), {"eval_last": 1}, r"data\.eval_last=1: .* data\.train names 2"),
    ],
)
def test_keys_that_contradict_are_named(load: Load, train: Any, data: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        load(train, **data)


def test_an_evaluation_set_that_takes_every_row_is_refused(load: Load) -> None:
    with pytest.raises(DataError, match=r"data\.eval_last=2 leaves nothing of the 2 rows"):
        load(rows(1, 2), eval_last=2)
    with pytest.raises(DataError, match="no usable row is left for training"):
        load(rows(1, 1), eval_fraction=0.1)
    with pytest.raises(DataError, match="there are no rows"):
        load(rows(1), eval=[])


def test_an_evaluation_set_without_usable_rows_is_refused(load: Load) -> None:
    with pytest.raises(
        DataError, match=r"no usable row is left for evaluation: 1 row skipped: unknown columns"
    ):
        load(rows(1), eval=[{"a": 1}], on_bad_row="skip")
