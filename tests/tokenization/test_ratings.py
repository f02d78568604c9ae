"""A rating has two sides, its own response and a mismatched one, and its numbers go with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import CHATML, small_tokenizer

from lora_dpo.batching import pack
from lora_dpo.errors import DataError
from lora_dpo.preferences import Demonstration, Preference, Rating, Where
from lora_dpo.tokenization import Branches, ChatTokenizer, Dropped, tokenize
from lora_dpo.tokenization.portable import record_from, record_text

# It refuses "REFUSE" anywhere, and a response that holds "SECRET" under a prompt without it.
TEMPLATE = (
    """{%- for m in messages %}
{%- if 'REFUSE' in m.content %}{{ raise_exception('no') }}{% endif %}
{%- if 'SECRET' in m.content and 'SECRET' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}
{%- endfor %}"""
    + CHATML
)
HERE = Where("ratings.jsonl", 3)


def turn(role: str, content: str) -> tuple[dict[str, Any], ...]:
    return ({"role": role, "content": content},)


def rating(prompt: str, response: str, mismatched: str | None, desirable: bool = True, **rest: Any) -> Rating:
    other = None if mismatched is None else turn("assistant", mismatched)
    ask, answer = turn("user", prompt), turn("assistant", response)
    return Rating(ask, answer, desirable, HERE, mismatched=other, **rest)


def chat(max_tokens: int = 200, template: str = TEMPLATE) -> ChatTokenizer:
    return ChatTokenizer(small_tokenizer(), template, max_tokens)


def sides(branches: Branches) -> list[tuple[list[int], list[bool]]]:
    return [(branches.side(n).tolist(), branches.scored[n].tolist()) for n in range(branches.sides)]


def test_its_sides_are_the_whole_conversations_with_either_response():
    found = chat().branches(rating("the cat", "sat", "ate the hat"))
    alone = [
        chat().branches(Demonstration(turn("user", "the cat"), turn("assistant", response), HERE))
        for response in ("sat", "ate the hat")
    ]
    assert sides(found) == [sides(one)[0] for one in alone]
    assert len(found.prefix) > 0


def test_its_sides_are_those_of_a_pair_also_when_cut():
    texts = ("the cat sat on the mat", "the red hat " * 9, "and the dog")
    prompt, response, other = turn("user", texts[0]), turn("assistant", texts[1]), turn("assistant", texts[2])
    pair = Preference(prompt, response, other, HERE)
    for limit in (16, 24, 200):
        found = chat(limit).branches(rating(*texts))
        assert sides(found) == sides(chat(limit).branches(pair))
        assert max(len(ids) for ids, _ in sides(found)) <= limit


def test_rendered_text_is_joined_with_the_other_response():
    record = Rating("Q: hat?\nA:", " yes", True, HERE, mismatched=" the sun")
    ids = small_tokenizer().encode("Q: hat?\nA: the sun")
    assert chat().branches(record).side(1).tolist()[: len(ids)] == ids


def test_without_a_mismatched_response_it_has_one_side():
    assert chat().branches(rating("the cat", "sat", None)).sides == 1


def test_responses_that_are_the_same_are_kept():
    found = chat().branches(rating("the cat", "sat", "sat"))
    assert [len(rest) for rest in found.rests] == [0, 0]
    cut = chat(16).branches(rating("the cat", "the " * 40 + "a", "the " * 40 + "b"))
    assert sides(cut)[0] == sides(cut)[1]
    (batch,) = pack([found, cut], 10_000)
    expected = [[item.scored_count(side) for side in range(2)] for item in (found, cut)]
    ordered = [expected[n] for n in batch.examples]
    assert batch.scored_lengths().tolist() == ordered


def test_a_mismatched_response_that_the_template_refuses_drops_the_rating_and_says_so():
    record = rating("the cat", "sat", "SECRET")
    with pytest.raises(Dropped, match="can't put another row's response under this prompt"):
        chat().branches(record)
    good = rating("the SECRET cat", "SECRET", "sat")
    for skip in (False, True):
        done = tokenize([record, good], chat(), skip_refused=skip)
        assert len(done.branches) == 1
        reason = "the chat template can't put another row's response under this prompt"
        assert done.describe_dropped() == f"1 dropped: {reason} (first: ratings.jsonl row 3)"


def test_a_rating_that_the_template_refuses_by_itself_is_an_error_as_any_record_is():
    with pytest.raises(DataError, match=r"ratings\.jsonl row 3: the chat template refuses"):
        chat().branches(rating("the cat", "REFUSE", "sat"))
    done = tokenize([rating("a", "REFUSE", "b"), rating("a", "b", "c")], chat(), skip_refused=True)
    assert done.dropped == {"the chat template refuses the conversation": 1}


# Values


def test_values_come_along():
    found = chat().branches(rating("the cat", "sat", "ate", False, values={"weight": 0.5}))
    assert found.values == {"weight": 0.5, "desirable": 0.0}
    pair = Preference(
        turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), HERE, values={"margin": -2.0}
    )
    assert chat().branches(pair).values == {"margin": -2.0}


def test_values_are_no_part_of_the_key():
    one = rating("the cat", "sat", "ate", True, values={"weight": 0.5})
    keys = {chat().branches(r).key for r in (one, replace(one, desirable=False), replace(one, values={}))}
    assert len(keys) == 1
    assert chat().branches(replace(one, mismatched=None)).key not in keys


def test_a_label_that_is_replaced_is_replaced_among_the_values():
    assert replace(rating("a", "b", "c"), desirable=False).values == {"desirable": 0.0}


@pytest.mark.parametrize(
    "record",
    [
        rating("the cat", "sat", "ate", False, values={"weight": 0.1}),
        rating("the cat", "sat", None),
        Rating("p", "a", True, HERE, mismatched="b"),
        Preference("p", "a", "b", HERE, values={"weight": 0.1, "margin": -1e-300}),
        Demonstration(turn("user", "a"), turn("assistant", "b"), HERE, template_kwargs={"x": 1}),
    ],
)
def test_records_travel_unchanged(record: Any):
    text = record_text(record)
    assert text is not None
    assert record_from(text) == record
