"""What is scored: the assistant's turns of the response, each with its end-of-turn, and nothing else."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from lora_dpo.errors import DataError, ModelError
from lora_dpo.preferences import Demonstration, Preference, Where
from lora_dpo.tokenization import ChatTokenizer, tokenize

HERE = Where("chats.jsonl", 3)
ASK = {"role": "user", "content": "What is 12 plus 30?"}
SHORT, LONG = "It is 42.", "Well, think about it: the answer is 42, is that right?"


def say(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


def demonstration(response: list[dict], prompt: tuple[dict, ...] = (ASK,), **settings) -> Demonstration:
    return Demonstration(prompt, tuple(response), HERE, template_kwargs=settings)


def scored_text(design, branches, side: int = 0) -> str:
    return design.tokenizer.decode(branches.side(side)[branches.scored[side]])


def runs(design, branches, side: int = 0) -> list[str]:
    """Each unbroken run of scored tokens as text."""
    ids, mask = branches.side(side).tolist(), branches.scored[side].tolist()
    edges = [i for i in range(len(ids)) if mask[i] and not mask[i - 1]]
    ends = [next((j for j in range(i, len(ids)) if not mask[j]), len(ids)) for i in edges]
    return [design.tokenizer.decode(ids[i:j]) for i, j in zip(edges, ends, strict=True)]


def test_the_response_and_its_end_of_turn_are_scored(design):
    record = Preference((ASK,), (say(LONG),), (say(SHORT),), HERE)
    branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(record)
    think = "<think>\n\n</think>\n\n" if design.name == "qwen3" else ""
    for side, text in enumerate((LONG, SHORT)):
        expected = design.lead + think + text + design.end
        assert scored_text(design, branches, side).strip() == expected.strip()
        bos = design.tokenizer("")["input_ids"]
        ids = design.ids(design.render([ASK, say(text)]))
        assert branches.side(side).tolist() == (ids if ids[: len(bos)] == bos else bos + ids)
    shared = len(branches.prefix)
    assert not branches.scored[0][0]
    assert (branches.scored[0][:shared] == branches.scored[1][:shared]).all()


def test_only_the_assistants_turns_of_a_longer_response_are_scored(design):
    response = [say("It is 42."), {"role": "user", "content": "Is that right?"}, say("I am fine.")]
    branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(demonstration(response))
    first, last = runs(design, branches)
    think = "<think>\n\n</think>\n\n" if design.name == "qwen3" else ""
    assert first.strip() == (design.lead + "It is 42." + design.middle).strip()
    assert last.strip() == (design.lead + think + "I am fine." + design.end).strip()


def test_generation_stops_where_turns_end(design):
    chat_tokenizer = ChatTokenizer(design.tokenizer, design.template, 1000)
    tokenizer = design.tokenizer
    expected = [tokenizer.convert_tokens_to_ids(design.end), tokenizer.eos_token_id]
    assert chat_tokenizer.end_of_turn_ids == tuple(dict.fromkeys(expected))


def test_trimmed_whitespace_and_kept_whitespace(designs):
    for name, said in (("llama3", "It is 42."), ("chatml", "  It is 42. \n")):
        design = designs[name]
        record = demonstration([say("  It is 42. \n")])
        branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(record)
        assert scored_text(design, branches) == said + design.end


def test_reasoning_is_scored_and_earlier_reasoning_is_dropped_as_the_template_says(designs):
    design = designs["qwen3"]
    more = {"role": "user", "content": "Is that right?"}
    for first, last in (
        (say("<think>\nten\n</think>\n\nIt is 42."), say("<think>\nyes\n</think>\n\nRight.")),
        (say("It is 42.", reasoning_content="ten"), say("Right.", reasoning_content="yes")),
    ):
        branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(
            demonstration([first, more, last])
        )
        assert runs(design, branches) == ["It is 42.<|im_end|>", "<think>\nyes\n</think>\n\nRight.<|im_end|>"]
        thinks = design.tokenizer.convert_tokens_to_ids("<think>")
        assert branches.side(0).tolist().count(thinks) == 1


def test_what_the_generation_prompt_writes_is_not_scored(designs):
    design = designs["qwen3"]
    record = demonstration([say(SHORT)], enable_thinking=False)
    branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(record)
    assert scored_text(design, branches) == SHORT + "<|im_end|>"


def test_harmony_scores_both_channels(designs):
    design = designs["harmony"]
    record = demonstration([say("It is 42.", thinking="ten")])
    branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(record)
    assert scored_text(design, branches) == (
        "<|channel|>analysis<|message|>ten<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is 42.<|return|>"
    )


def test_tool_calls_are_scored_and_tool_results_are_not(designs):
    design = designs["chatml"]
    call = {"function": {"name": "now", "arguments": {}}}
    response = [say("", tool_calls=[call]), {"role": "tool", "content": "Paris"}, say("Paris")]
    branches = ChatTokenizer(design.tokenizer, design.template, 1000).branches(demonstration(response))
    called = '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>'
    assert runs(design, branches) == [called, "Paris<|im_end|>"]


def test_a_header_without_generation_prompt_is_not_scored(designs):
    design = designs["chatml"]
    template = design.template.split("{%- if add_generation_prompt")[0]
    branches = ChatTokenizer(design.tokenizer, template, 1000).branches(demonstration([say(SHORT)]))
    assert scored_text(design, branches) == SHORT + "<|im_end|>"


def test_a_template_that_looks_at_the_content_still_gives_the_ordinary_ids(designs):
    design = designs["chatml"]
    look = "{{- 'Short:' if m.content | length < 10 else 'Long:' }}"
    template = design.template.replace("{%- if m.content %}", look + "{%- if m.content %}")
    branches = ChatTokenizer(design.tokenizer, template, 1000).branches(demonstration([say(SHORT)]))
    whole = design.tokenizer.decode(branches.side(0))
    assert whole.startswith("<|im_start|>user\nLong:What is 12") and "Short:It is 42." in whole
    assert scored_text(design, branches) == "Short:" + SHORT + "<|im_end|>"


def test_a_missing_end_of_turn_is_added_and_scored_once(designs):
    design = designs["chatml"]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    branches = ChatTokenizer(design.tokenizer, template, 1000).branches(demonstration([say(SHORT)]))
    assert branches.side(0).tolist().count(design.tokenizer.eos_token_id) == 1
    assert scored_text(design, branches) == " " + SHORT + "\n<|im_end|>"


BAD_TEMPLATES = {
    "two BOS": "{{ bos_token + bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.role + m.content + eos_token + eos_token }}{% endfor %}",
    "no token of its own": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
    "leaves out": "{% for m in messages if m.role == 'user' %}{{ m.content + eos_token }}{% endfor %}",
}


@pytest.mark.parametrize("complaint", BAD_TEMPLATES)
def test_templates_that_break_the_rules_are_named(designs, complaint):
    tokenizer = designs["mistral"].tokenizer
    response = [say("One"), {"role": "user", "content": "And"}, say("Two")]
    with pytest.raises(ModelError, match=rf"chats\.jsonl row 3.*{complaint}.*data\.chat_template"):
        ChatTokenizer(tokenizer, BAD_TEMPLATES[complaint], 1000).branches(demonstration(response))


def test_a_word_that_takes_the_headers_last_space_along_is_scored(designs):
    """ " It" is one token here; it would otherwise start in the header, and the first word would be lost."""
    design = designs["chatml"]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    branches = ChatTokenizer(design.tokenizer, template, 1000).branches(demonstration([say("answer is")]))
    assert scored_text(design, branches) == " answer is<|im_end|>"
    record = Demonstration("Question: ", "answer is", HERE)
    branches = ChatTokenizer(design.tokenizer, None, 1000).branches(record)
    assert scored_text(design, branches) == " answer is<|im_end|>"
    branches = ChatTokenizer(design.tokenizer, template, 1000).branches(demonstration([say("\nIt")]))
    assert scored_text(design, branches) == "\nIt<|im_end|>"


def test_one_bos_whoever_writes_it(designs):
    for name in ("llama3", "mistral", "gemma", "zephyr"):
        design = designs[name]
        chat_tokenizer = ChatTokenizer(design.tokenizer, design.template, 1000)
        for ids in (
            chat_tokenizer.branches(demonstration([say(SHORT)])).side(0),
            chat_tokenizer.prompt_ids([ASK]),
        ):
            assert ids[0] == design.tokenizer.bos_token_id
            assert ids.tolist().count(design.tokenizer.bos_token_id) == 1


def test_a_template_may_begin_every_turn_with_bos(designs):
    """As Llama 2's does, and SmolLM2's, whose BOS is <|im_start|>."""
    tokenizer = designs["mistral"].tokenizer
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    response = [say("One"), {"role": "user", "content": "And"}, say("Two")]
    ids = ChatTokenizer(tokenizer, template, 1000).branches(demonstration(response)).side(0).tolist()
    assert ids.count(tokenizer.bos_token_id) == 2


def test_no_template_and_no_such_file_say_what_to_set(designs, tmp_path):
    design = designs["chatml"]
    with pytest.raises(ModelError, match=r"data\.chat_template.*data\.format"):
        ChatTokenizer(design.tokenizer, None, 1000).branches(demonstration([say(SHORT)]))
    with pytest.raises(ModelError, match=r"nowhere\.jinja"):
        ChatTokenizer(design.tokenizer, "nowhere.jinja", 1000)
    path = tmp_path / "chat.jinja"
    path.write_text(design.template)
    from_file = ChatTokenizer(design.tokenizer, str(path), 1000)
    assert from_file.chat_template == design.template
    assert scored_text(design, from_file.branches(demonstration([say(SHORT)]))) == SHORT + "<|im_end|>"


def test_a_conversation_the_template_refuses_is_named(designs):
    design = designs["gemma"]
    prompt = ({"role": "system", "content": "Be short."}, ASK)
    with pytest.raises(DataError, match=r"chats\.jsonl row 3.*System role not supported"):
        ChatTokenizer(design.tokenizer, design.template, 1000).branches(demonstration([say(SHORT)], prompt))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        chat_template = None
        added_tokens_decoder = MappingProxyType({})

    with pytest.raises(ModelError, match="fast tokenizer"):
        ChatTokenizer(Slow(), None, 1000)  # pyright: ignore[reportArgumentType]


def test_rendered_text_is_taken_verbatim(designs):
    design = designs["llama3"]
    end, eos, bos = "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"
    prompt = "What is 12 plus 30?<|eot_id|>\n"
    for start in ("", bos):
        record = Preference(start + prompt, "It is 42." + end, "No" + eos, HERE)
        branches = ChatTokenizer(design.tokenizer, None, 1000).branches(record)
        assert [scored_text(design, branches, i) for i in range(2)] == ["It is 42." + end, "No" + eos]
        assert design.tokenizer.decode(branches.side(0)) == bos + prompt + "It is 42." + end
    record = Demonstration(prompt, "It is 42.", HERE)
    branches = ChatTokenizer(design.tokenizer, None, 1000).branches(record)
    assert scored_text(design, branches) == "It is 42." + eos
    assert ChatTokenizer(design.tokenizer, None, 1000).end_of_turn_ids == (design.tokenizer.eos_token_id,)


def test_a_data_set_keeps_its_order_and_says_how_far_it_is(designs):
    design = designs["chatml"]
    chat_tokenizer = ChatTokenizer(design.tokenizer, design.template, 1000)
    records = [
        Preference((ASK,), (say(a),), (say(b),), Where("x", n))
        for n, (a, b) in enumerate([("One", "Two"), ("Same", "Same"), ("Two", "One"), ("Yes", "Yes")])
    ]
    heard = []
    tokenized = tokenize(records, chat_tokenizer, heard.append)
    assert [branches.where.row for branches in tokenized.branches] == [0, 2]
    assert heard == [1, 1, 1, 1]
    reason = "responses are identical once tokenized"
    assert (dict(tokenized.dropped), tokenized.first_dropped) == ({reason: 2}, {reason: Where("x", 1)})
    assert tokenized.describe_dropped() == f"2 dropped: {reason} (first: x row 1)"
    with pytest.raises(DataError, match=r"no row is left.*2 dropped|no row is left.*1 dropped"):
        tokenize(records[1:2], chat_tokenizer)
