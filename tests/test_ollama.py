"""Modelfiles, read back by a parser with Ollama's rules; TEMPLATE run and compared with the tokenizer's own.

Ollama itself isn't run here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import CHATML, save_small_model, small_tokenizer
from modelfile_reader import parse, run
from tokenizer_designs import BUILDERS, TRICKY

from lora_dpo.errors import RunError
from lora_dpo.export.ollama.chat_turns import NotExpressible, find_turns
from lora_dpo.export.ollama.go_template import literal
from lora_dpo.export.ollama.modelfile import (
    MODELFILE,
    adds_bos,
    sampling,
    stop_words,
    template_of,
    write_modelfile,
)

LLAMA2 = """{%- set given = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if given else messages) %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' }}
{%- if loop.first and given %}{{ '<<SYS>>\n' + given + '\n<</SYS>>\n\n' }}{% endif %}
{{- m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

MISTRAL_LAST = """{{- bos_token }}
{%- set given = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if given else messages) %}{% if m.role == 'user' %}{{ '[INST]' }}
{%- if loop.last and given %}{{ given + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""

QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)

COUNTED = """{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + loop.index | string + '\n' }}
{{- m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"""

QUOTING = CHATML.replace("'\n' + m", "'\n\"\"\"{{' + '\u00a0' + m")

TEXTS = [
    "Hi there",
    "What is\n\n12 + 30?",
    'Say """quoted""" and {{ .Content }}',
    "你好 😀",
    "<b>x</b> | \\n",
]


def conversations(system: bool) -> list[list[dict[str, str]]]:
    made = []
    for turns in (1, 3, 5):
        messages = [
            {"role": "assistant" if n % 2 else "user", "content": TEXTS[(n + turns) % len(TEXTS)]}
            for n in range(turns)
        ]
        made.append(messages)
        if system:
            made.append([{"role": "system", "content": TEXTS[turns % len(TEXTS)]}, *messages])
    return made


def tokenizer_with(name: str, template: str | None = None) -> Any:
    design = (BUILDERS | TRICKY)[name]()
    design.tokenizer.chat_template = template or design.template
    return design.tokenizer


def own_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def written(tokenizer: Any, folder: Path) -> dict[str, str]:
    """The Modelfile of a tokenizer's folder, read back; stop words under their own key are left out."""
    tokenizer.save_pretrained(folder)
    write_modelfile(folder, folder)
    return dict(parse((folder / MODELFILE).read_text(encoding="utf-8")))


CASES: dict[str, tuple[str, str | None]] = {
    **{name: (name, None) for name in [*BUILDERS, *TRICKY]},
    "llama2": ("mistral", LLAMA2),
    "mistral-last": ("mistral", MISTRAL_LAST),
    "default-system": ("chatml", QWEN25),
    "quotes-and-braces": ("chatml", QUOTING),
}


@pytest.mark.parametrize("case", CASES)
def test_the_template_writes_what_the_tokenizers_own_writes(case: str, tmp_path: Path):
    tokenizer = tokenizer_with(*CASES[case])
    template = written(tokenizer, tmp_path)["template"]
    for messages in conversations(system=case != "gemma"):
        assert run(template, messages) == own_text(tokenizer, messages), messages


def test_an_assistants_last_message_is_left_open(tmp_path: Path):
    template = written(tokenizer_with("chatml"), tmp_path)["template"]
    begun = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Once upon"}]
    assert run(template, begun).endswith("<|im_start|>assistant\nOnce upon")


@pytest.mark.parametrize("case", ["llama3", "llama2"])
def test_the_bos_that_ollama_adds_itself_is_written_nowhere_else(case: str, tmp_path: Path):
    tokenizer = tokenizer_with(*CASES[case])
    template = written(tokenizer, tmp_path)["template"]
    assert not run(template, conversations(True)[1]).startswith(tokenizer.bos_token)
    ids = tokenizer(run(template, [{"role": "user", "content": "Hi"}])).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_bos_that_nothing_else_adds_stays_in_the_template(tmp_path: Path):
    tokenizer = tokenizer_with("harmony", "{{ bos_token }}" + BUILDERS["harmony"]().template)
    assert not adds_bos(tokenizer)
    text = run(written(tokenizer, tmp_path)["template"], [{"role": "user", "content": "Hi"}])
    assert text.startswith("<|startoftext|><|start|>user")


def test_a_template_that_is_no_fixed_text_around_turns_is_left_out_and_said(tmp_path: Path):
    tokenizer = tokenizer_with("chatml", COUNTED)
    tokenizer.save_pretrained(tmp_path)
    made = write_modelfile(tmp_path, tmp_path)
    assert not made.templated
    assert "template" not in dict(parse(made.text))
    assert any("no TEMPLATE" in note and "otherwise than earlier" in note for note in made.notes)


def test_a_template_that_only_looks_regular_is_found_out():
    """It turns quotes into others, which no text around the turns shows."""

    def render(messages: Any, generation: bool) -> str:
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages).replace('"', "'")
        return text + ("<assistant>" if generation else "")

    with pytest.raises(NotExpressible, match="written otherwise"):
        find_turns(render, "", False)


def test_what_ollama_has_no_way_to_say_is_said():
    _, gemma = template_of(tokenizer_with("gemma"))
    assert any("takes no system message" in note for note in gemma)
    assert any("strips white space" in note for note in gemma)
    _, tools = template_of(tokenizer_with("mistral-tools"))
    assert any("tools" in note for note in tools)
    dated = "{{ strftime_now('%Y') }}" + CHATML
    _, date = template_of(tokenizer_with("chatml", dated))
    assert any("today's date" in note for note in date)


def test_without_a_chat_template_there_is_no_template():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = None
    template, notes = template_of(tokenizer)
    assert template is None and "no chat template" in notes[0]


@pytest.mark.parametrize("case", ["llama3", "gemma", "phi", "chatml"])
def test_generation_stops_where_the_templates_turns_end(case: str, tmp_path: Path):
    tokenizer = tokenizer_with(case)
    assert stop_words(tokenizer)[0] == BUILDERS[case]().end
    tokenizer.save_pretrained(tmp_path)
    commands = parse(write_modelfile(tmp_path, tmp_path).text)
    assert [value for name, value in commands if name == "stop"] == stop_words(tokenizer)


def test_literals_survive_ollamas_parser_and_gos():
    for text in [
        '"""',
        "{{ x }}",
        "a\u00a0b",
        "tab\tend",
        'ends with "',
        "ends with {",
        "\u200b",
        "\ue000",
        "\\n",
    ]:
        written = f'FROM x\nTEMPLATE """{literal(text)}{{{{ .System }}}}"""\n'
        (_, template) = parse(written)[1]
        assert run(template, []) == text, text


def test_parameters_are_those_of_the_generation_config_and_no_others():
    assert sampling({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2}) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
    }
    assert sampling({"repetition_penalty": 1.05, "temperature": None}) == {"repeat_penalty": 1.05}
    assert sampling({"do_sample": False, "temperature": 0.6}) == {"temperature": 0}
    assert sampling({}) == {}


def test_a_merged_folder_is_served_from_where_the_modelfile_lies(tmp_path: Path):
    model = save_small_model(tmp_path / "model")
    values = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(values | {"temperature": 0.7, "top_k": 40}))
    made = write_modelfile(model, model)
    commands = dict(parse(made.text))
    assert commands["from"] == "./"
    assert (commands["temperature"], commands["top_k"]) == ("0.7", "40")
    assert commands["num_ctx"] == "1024"  # all that the model was made for; Ollama would give it more
    assert made.text == (model / MODELFILE).read_text()
    assert any("ollama create" in line for line in made.describe())


def test_a_longer_context_is_left_to_ollama_unless_it_is_given(tmp_path: Path):
    model = save_small_model(tmp_path / "model", max_position_embeddings=32768)
    made = write_modelfile(model, model)
    assert "num_ctx" not in dict(parse(made.text))
    assert any("32,768" in note for note in made.notes)
    assert dict(parse(write_modelfile(model, model, context=8192).text))["num_ctx"] == "8192"


def test_paths_are_those_that_ollama_reads(tmp_path: Path):
    model = save_small_model(tmp_path / "my model")
    out = tmp_path / "out folder"
    (out / "deeper").mkdir(parents=True)
    inside, outside = out / "deeper" / "m.gguf", tmp_path / "a b.gguf"
    made = dict(parse(write_modelfile(out, model, source=inside, adapter=outside).text))
    assert (out / made["from"]).resolve() == inside.resolve()
    assert made["adapter"] == str(outside)
    assert dict(parse(write_modelfile(out, model, source="qwen2.5:7b").text))["from"] == "qwen2.5:7b"
    with pytest.raises(RunError, match="can't name"):
        write_modelfile(out, model, source=tmp_path / 'a"b.gguf')


def test_an_architecture_that_ollama_may_not_import_is_said(tmp_path: Path):
    model = save_small_model(tmp_path / "model")
    assert not any("import" in note for note in write_modelfile(model, model).notes)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    assert any("OddForCausalLM" in note for note in write_modelfile(model, model).notes)
