"""Each public layout gives the record written out here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from lora_dpo.preferences import Demonstration, Preference, Where, load_demonstrations, load_preferences
from lora_dpo.recipe import Data


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PairOf = Callable[..., Preference]
DemonstrationOf = Callable[..., Demonstration]
PLACE = Where("placed by the test", 1)


@pytest.fixture
def pair_of(rows_file: Callable[[list[Any]], str]) -> PairOf:
    def load(row: dict[str, Any], **data: Any) -> Preference:
        (record,) = load_preferences(Data(rows_file([row]), **data)).train
        return dataclasses.replace(record, where=PLACE)

    return load


@pytest.fixture
def demonstration_of(rows_file: Callable[[list[Any]], str]) -> DemonstrationOf:
    def load(row: dict[str, Any], **data: Any) -> Demonstration:
        (record,) = load_demonstrations(Data(rows_file([row]), **data)).train
        return dataclasses.replace(record, where=PLACE)

    return load


HI, YES, NO = user("hi"), assistant("yes"), assistant("no")
SAID = "\n\nHuman: hi\n\nAssistant:"

SAME_PAIR = {
    "explicit strings": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "explicit message lists": {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
    "prompt text, message lists": {"prompt": "hi", "chosen": [YES], "rejected": [NO]},
    "prompt list, single messages": {"prompt": [HI], "chosen": YES, "rejected": NO},
    "prompt list, strings": {"prompt": [HI], "chosen": "yes", "rejected": "no"},
    "UltraFeedback": {
        "prompt": "hi",
        "prompt_id": "0",
        "chosen": [HI, YES],
        "rejected": [HI, NO],
        "messages": [HI, YES],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "UltraFeedback, prompt as messages": {"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]},
    "implicit prompt": {"chosen": [HI, YES], "rejected": [HI, NO]},
    "HH": {"chosen": f"{SAID} yes", "rejected": f"{SAID} no"},
    "HH, prompt beside it": {"prompt": SAID, "chosen": f"{SAID} yes", "rejected": f"{SAID} no"},
    "HH prompt, responses carry the space": {"prompt": SAID, "chosen": " yes", "rejected": " no"},
    "HH prompt that ends in the space": {"prompt": f"{SAID} ", "chosen": "yes", "rejected": "no"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "ShareGPT lists": {
        "conversations": [{"from": "user", "value": "hi"}],
        "chosen": [{"from": "assistant", "value": "yes"}],
        "rejected": [{"from": "assistant", "value": "no"}],
    },
    "ShareGPT strings, standard messages": {"conversations": [HI], "chosen": "yes", "rejected": "no"},
    "Alpaca": {"instruction": "hi", "input": "", "output": "yes", "chosen": "yes", "rejected": "no"},
    "Orca": {"system": "", "question": "hi", "chosen": "yes", "rejected": "no"},
    "Orca with input": {"system": None, "input": "hi", "chosen": "yes", "rejected": "no"},
    "absent columns are None": {
        "prompt": "hi",
        "chosen": "yes",
        "rejected": "no",
        "tools": None,
        "conversations": None,
    },
    "scored strings": {"prompt": "hi", "responses": ["so", "yes", "no"], "scores": [2, 3, 1.5]},
    "ranked strings": {"question": "hi", "answers": ["no", "yes", "so"], "ranks": [3, 1, 2]},
    "scored objects": {
        "instruction": "hi",
        "completions": [
            {"response": "no", "overall_score": 2.0, "model": "a"},
            {"response": "yes", "overall_score": 9.0, "model": "b"},
        ],
    },
    "ratings as text": {
        "prompt": "hi",
        "responses": [{"text": "yes", "rating": "5"}, {"text": "no", "rating": "4"}],
    },
    "ranked objects under an HH prompt": {
        "prompt": f"{SAID} ",
        "answers": [
            {"answer": "no", "rank": 7.0},
            {"answer": "yes", "rank": 1.0},
            {"answer": "so", "rank": 2.0},
        ],
    },
    "ranked message lists": {"prompt": [HI], "completions": [[NO], [YES]], "scores": [0, 1]},
    "labelled by index": {"prompt": "hi", "response_0": "no", "response_1": "yes", "better_response_id": 1},
    "labelled by letter": {"prompt": "hi", "response_a": "yes", "response_b": "no", "preferred": "A"},
}


@pytest.mark.parametrize("name", SAME_PAIR)
def test_every_layout_of_one_pair_gives_the_same_record(pair_of: PairOf, name: str) -> None:
    assert pair_of(SAME_PAIR[name]) == Preference((HI,), (YES,), (NO,), PLACE)


@pytest.mark.parametrize("name", SAME_PAIR)
def test_every_preference_layout_is_a_demonstration_of_chosen(
    demonstration_of: DemonstrationOf, name: str
) -> None:
    row = {key: value for key, value in SAME_PAIR[name].items() if key != "messages"}
    assert demonstration_of(row) == Demonstration((HI,), (YES,), PLACE)


SAME_DEMONSTRATION = {
    "messages": {"messages": [HI, YES]},
    "prompt and completion": {"prompt": "hi", "completion": "yes"},
    "conversational prompt and completion": {"prompt": [HI], "completion": [YES]},
    "Alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "question and response": {"question": "hi", "response": "yes"},
    "chosen without rejected": {"prompt": "hi", "chosen": "yes"},
    "transcript": {"chosen": f"{SAID} yes"},
}


@pytest.mark.parametrize("name", SAME_DEMONSTRATION)
def test_every_demonstration_layout_gives_the_same_record(
    demonstration_of: DemonstrationOf, name: str
) -> None:
    assert demonstration_of(SAME_DEMONSTRATION[name]) == Demonstration((HI,), (YES,), PLACE)


def test_all_assistant_turns_of_a_demonstration_are_in_its_response(
    demonstration_of: DemonstrationOf,
) -> None:
    turns = [system("brief"), HI, YES, user("why"), NO]
    record = demonstration_of({"messages": turns})
    assert (record.prompt, record.response) == ((turns[0], HI), (YES, user("why"), NO))


def test_the_shared_beginning_of_two_conversations_is_the_prompt(pair_of: PairOf) -> None:
    beginning = [system("brief"), HI, YES, user("why")]
    record = pair_of({"chosen": [*beginning, assistant("a")], "rejected": [*beginning, assistant("b")]})
    assert record.prompt == tuple(beginning)
    assert (record.chosen, record.rejected) == ((assistant("a"),), (assistant("b"),))


def test_responses_may_have_several_turns(pair_of: PairOf) -> None:
    chosen = [HI, assistant("a"), user("go on"), assistant("b")]
    record = pair_of({"chosen": chosen, "rejected": [HI, NO]})
    assert (record.prompt, record.chosen, record.rejected) == ((HI,), tuple(chosen[1:]), (NO,))


def test_a_conversation_that_continues_the_other_keeps_the_shared_answer_in_both_responses(
    pair_of: PairOf,
) -> None:
    record = pair_of({"chosen": [HI, YES, user("why"), NO], "rejected": [HI, YES]})
    assert (record.prompt, record.chosen, record.rejected) == ((HI,), (YES, user("why"), NO), (YES,))


def test_a_transcript_keeps_all_white_space_but_the_marker_s_own(pair_of: PairOf) -> None:
    before = "\n\nHuman:  two spaces \n\nmiddle\n\nAssistant: ok\n\nHuman: and?\n\nAssistant:"
    record = pair_of({"chosen": before + "\ta\n", "rejected": before + " b "})
    assert record.prompt == (user(" two spaces \n\nmiddle"), assistant("ok"), user("and?"))
    assert (record.chosen, record.rejected) == ((assistant("\ta\n"),), (assistant("b "),))


def test_a_mention_of_human_inside_a_prompt_is_text(pair_of: PairOf) -> None:
    text = "Explain '\n\nHuman: x\n\nAssistant: y'"
    assert pair_of({"prompt": text, "chosen": "a", "rejected": "b"}).prompt == (user(text),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "a", "rejected": "b"},
        {"prompt": "hi", "chosen": [HI, assistant("a")], "rejected": [HI, assistant("b")]},
        {"conversations": [HI], "chosen": "a", "rejected": "b"},
        {"instruction": "hi", "chosen": "a", "rejected": "b"},
        {"question": "hi", "chosen": "a", "rejected": "b"},
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 0]},
    ],
)
def test_the_system_column_becomes_the_first_message(pair_of: PairOf, row: dict[str, Any]) -> None:
    assert pair_of({**row, "system": "brief"}).prompt == (system("brief"), HI)


def test_a_system_column_that_repeats_the_conversation_s_own_is_not_added_twice(pair_of: PairOf) -> None:
    row = {"system": "brief", "prompt": [system("brief"), HI], "chosen": "a", "rejected": "b"}
    assert pair_of(row).prompt == (system("brief"), HI)


def test_alpaca_joins_instruction_and_input_with_a_newline_after_its_history(pair_of: PairOf) -> None:
    row = {"instruction": "do", "input": "this", "history": [["hi", "yes"]], "chosen": "a", "rejected": "b"}
    assert pair_of(row).prompt == (HI, YES, user("do\nthis"))


def test_sharegpt_speakers_are_mapped_to_roles_and_calls(pair_of: PairOf) -> None:
    conversation = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"at": "x"}}'},
        {"from": "observation", "value": "12"},
    ]
    row = {"conversations": conversation, "chosen": "a", "rejected": "b"}
    call = {"type": "function", "function": {"name": "get", "arguments": {"at": "x"}}}
    assert pair_of(row).prompt == (
        system("s"),
        user("weather?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
    )


def test_tool_calls_reasoning_and_names_of_messages_pass_through(pair_of: PairOf) -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": {"unit": None}}}
    prompt = [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
    ]
    chosen = {"role": "assistant", "content": "a", "reasoning_content": "because", "weight": None}
    record = pair_of({"prompt": prompt, "chosen": [chosen], "rejected": "b"})
    assert record.prompt == (prompt[0], {"role": "assistant", "content": "", "tool_calls": [call]}, prompt[2])
    assert record.chosen == ({"role": "assistant", "content": "a", "reasoning_content": "because"},)


def test_a_tool_call_is_a_response(pair_of: PairOf) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get"}}]}
    assert pair_of({"prompt": "hi", "chosen": [call], "rejected": "b"}).chosen == (call,)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_kwargs_come_as_objects_or_json(pair_of: PairOf, as_text: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    kwargs: Any = {"enable_thinking": False}
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    row["tools"] = str(tools).replace("'", '"') if as_text else tools
    row["chat_template_kwargs"] = '{"enable_thinking": false}' if as_text else kwargs
    record = pair_of(row)
    assert (record.tools, record.template_kwargs) == (tuple(tools), kwargs)


def test_rows_of_one_source_may_have_different_layouts(rows_file: Callable[[list[Any]], str]) -> None:
    rows = list(SAME_PAIR.values())
    loaded = load_preferences(Data(rows_file(rows)))
    assert [record.where.row for record in loaded.train] == list(range(1, len(rows) + 1))
    assert {record.prompt for record in loaded.train if isinstance(record.prompt, str)} == set()
    assert all(record.prompt == (HI,) for record in loaded.train)


def test_text_is_taken_verbatim(pair_of: PairOf) -> None:
    row = {"prompt": f"{SAID} ", "chosen": " a<|im_end|>\n", "rejected": "\tb"}
    record = pair_of(row, format="text")
    assert (record.prompt, record.chosen, record.rejected) == (row["prompt"], row["chosen"], row["rejected"])


def test_text_without_a_prompt_is_two_whole_texts(pair_of: PairOf) -> None:
    record = pair_of({"prompt": None, "chosen": f"{SAID} a", "rejected": f"{SAID} b"}, format="text")
    assert (record.prompt, record.chosen) == ("", f"{SAID} a")


@pytest.mark.parametrize("column", ["text", "completion", "chosen"])
def test_text_demonstrations_take_a_prompt_and_a_text(demonstration_of: DemonstrationOf, column: str) -> None:
    record = demonstration_of({"prompt": "p", column: " a"}, format="text")
    assert (record.prompt, record.response) == ("p", " a")


def test_the_earliest_best_and_the_latest_worst_response_make_the_pair(pair_of: PairOf) -> None:
    record = pair_of({"prompt": "hi", "responses": ["a", "b", "c", "d"], "scores": [2, 2, 1, 1]})
    assert (record.chosen, record.rejected) == ((assistant("a"),), (assistant("d"),))
