"""What is cut when a record is too long; one token a letter, so that every length is counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_dpo.preferences import Preference, Where
from lora_dpo.tokenization import ChatTokenizer, Dropped

HERE = Where("long.jsonl", 9)
# Each turn is its role's letter, its content, and a dot: two tokens more than its content.
TEMPLATE = "{{ '^' }}{% for m in messages %}{{ m.role[0] + m.content + '.' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)


def letters(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {chr(code): code for code in range(32, 127)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("^", special=True), AddedToken(".", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="^" if adds_bos else None, eos_token="."
    )


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(prompt, chosen: str, rejected: str) -> Preference:
    if isinstance(prompt, str):
        return Preference(prompt, chosen, rejected, HERE)
    return Preference(tuple(prompt), (turn("assistant", chosen),), (turn("assistant", rejected),), HERE)


def sides(record: Preference, max_tokens: int, max_prompt: int | None = None) -> list[str]:
    branches = ChatTokenizer(letters(), TEMPLATE, max_tokens, max_prompt).branches(record)
    texts = ["".join(map(chr, branches.side(i))) for i in range(branches.sides)]
    for text, mask in zip(texts, branches.scored, strict=True):
        assert not mask[0]
        assert mask.tolist() == [i > text.rindex("a") for i in range(len(text))]
    return texts


CHAT = [turn("system", "SS"), turn("user", "UUU"), turn("assistant", "AA"), turn("user", "VV")]
WHOLE = "^sSS.uUUU.aAA.uVV.a"  # 19 tokens


@pytest.mark.parametrize(
    "max_prompt, kept",
    [
        (19, WHOLE),
        (18, "^sSS.uVV.a"),  # the oldest go: the user's message, and the assistant's, which can't come first
        (10, "^sSS.uVV.a"),
        (9, "^uVV.a"),  # the system's message doesn't fit any more
        (6, "^uVV.a"),
        (5, "^VV.a"),  # the last message alone is too long: tokens on the left, but not the BOS
        (2, "^a"),
    ],
)
def test_the_prompt_gives_up_its_oldest_messages_first(max_prompt, kept):
    assert sides(pair(CHAT, "XX", "YYY"), 100, max_prompt) == [kept + "XX.", kept + "YYY."]


def test_a_prompt_of_one_token_is_the_bos():
    branches = ChatTokenizer(letters(), TEMPLATE, 100, 1).branches(pair(CHAT, "XX", "YYY"))
    assert "".join(map(chr, branches.side(0))) == "^XX."


def test_the_prompt_makes_room_for_the_longest_response():
    record = pair(CHAT, "X" * 9, "Y" * 3)  # 19 + 10 tokens
    assert sides(record, 29) == [WHOLE + "X" * 9 + ".", WHOLE + "YYY."]
    assert sides(record, 28) == ["^sSS.uVV.a" + "X" * 9 + ".", "^sSS.uVV.aYYY."]
    assert sides(record, 16) == ["^uVV.a" + "X" * 9 + ".", "^uVV.aYYY."]


def test_the_prompt_keeps_a_quarter_and_responses_lose_their_ends():
    record = pair(CHAT, "X" * 30, "Y" * 3)
    assert sides(record, 20) == ["^VV.a" + "X" * 15, "^VV.aYYY."]
    assert sides(record, 24) == ["^uVV.a" + "X" * 18, "^uVV.aYYY."]


def test_a_short_prompt_is_not_touched_for_a_long_response():
    record = pair([turn("user", "V")], "X" * 30, "Y" * 30)
    assert sides(record, 20, 10) == ["^uV.a" + "X" * 15, "^uV.a" + "Y" * 15]


def test_both_limits_together():
    record = pair(CHAT, "X" * 8, "Y" * 3)
    assert sides(record, 17, 10) == ["^uVV.a" + "X" * 8 + ".", "^uVV.aYYY."]


def test_a_pair_that_loses_its_difference_is_dropped():
    record = pair([turn("user", "V")], "X" * 30 + "Y", "X" * 30 + "Z")
    with pytest.raises(Dropped) as dropped:
        sides(record, 20)
    assert (dropped.value.reason, dropped.value.where) == ("responses are identical after truncation", HERE)
    assert len(sides(record, 36)[0]) == 36


def test_rendered_text_loses_tokens_on_the_left_but_not_its_bos():
    branches = ChatTokenizer(letters(), None, 100, 4).branches(pair("^abcdefg", "xy", "z"))
    assert ["".join(map(chr, branches.side(i))) for i in range(2)] == ["^efgxy.", "^efgz."]
    assert [mask.tolist() for mask in branches.scored] == [[False] * 4 + [True] * 3, [False] * 4 + [True] * 2]
    branches = ChatTokenizer(letters(adds_bos=False), None, 100, 4).branches(pair("abcdefg", "xy", "z"))
    assert "".join(map(chr, branches.side(0))) == "defgxy."


def test_nothing_scored_is_dropped():
    """A response whose first turns are a tool's doing: cut before the assistant says anything."""
    empty = pair("abc", "", "x")
    with pytest.raises(Dropped, match="nothing left to score"):
        ChatTokenizer(letters(adds_bos=False), None, 3, None).branches(pair("", "", "x"))
    assert ChatTokenizer(letters(adds_bos=False), None, 30, None).branches(empty).scored_count(0) == 1


CONTENT = st.integers(1, 12)


@settings(max_examples=80, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=5), CONTENT, CONTENT, st.integers(8, 60), st.integers(2, 40))
def test_limits_hold_and_both_sides_keep_the_same_prompt(sizes, chosen, rejected, max_tokens, max_prompt):
    roles = ["user", "assistant"] * len(sizes)
    prompt = [turn(roles[i % 2], "V" * size) for i, size in enumerate(sizes[: len(sizes) // 2 * 2 + 1])]
    prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    record = pair(prompt, "X" * chosen, "Y" * rejected)
    first, second = sides(record, max_tokens, max_prompt)
    prompts = [text[: text.rindex("a") + 1] for text in (first, second)]
    assert prompts[0] == prompts[1] and prompts[0].startswith("^")
    assert max(len(first), len(second)) <= max_tokens
    assert len(prompts[0]) <= max_prompt
    longest = max(chosen, rejected) + 1
    if len(prompts[0]) + longest > max_tokens:
        assert len(prompts[0]) <= max(max_tokens // 4, 2)
