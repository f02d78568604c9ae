"""Responses in files: a job that was killed goes on, and ends as one that wasn't."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builders import CHATML, pair_rows, small_tokenizer
from test_sampling import model_of

from lora_dpo.answering import answer_prompts
from lora_dpo.cli.sampling import described
from lora_dpo.errors import DataError, RecipeError, RunError
from lora_dpo.model import Model
from lora_dpo.preferences import load_preferences, load_prompts
from lora_dpo.recipe import Data, Recipe, Sampling, to_yaml
from lora_dpo.run_directory import GrowingFile, growing
from lora_dpo.sampling import files, prompt_key, sample, sample_to_file, sampler_id
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Display

SETTINGS = Sampling(responses=2, max_new_tokens=6, tokens_in_cache=220)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(small_tokenizer())


@pytest.fixture(scope="module")
def model(chat: ChatTokenizer) -> Model:
    from builders import llama_config

    made = model_of(llama_config(vocab_size=320))
    made.tokenizer = small_tokenizer()
    return made


@pytest.fixture
def records(tmp_path: Path) -> list[Any]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["prompt"] * (n % 3 + 1)}) + "\n"
                            for n, row in enumerate(pair_rows(12))))  # fmt: skip
    return load_prompts(Data(str(file))).train


def draw(model: Model, chat: ChatTokenizer, records: Any, file: Path, **changes: Any) -> files.Counts:
    given: dict[str, Any] = {"sampler": "s", "display": Display(quiet=True)} | changes
    return sample_to_file(model, chat, records, SETTINGS, file, **given)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_holds_the_prompt_and_what_was_drawn_for_it(model, chat, records, tmp_path: Path):
    file = tmp_path / "out" / "responses.jsonl"
    counts = draw(model, chat, [*records, records[0]], file)
    assert (counts.prompts, counts.known, counts.repeated, counts.too_long) == (12, 0, 1, 0)
    lines = {line["id"]: line for line in read(file)}
    assert len(lines) == 12 and counts.responses == 24
    prompts = [chat.prompt_ids(record.prompt).tolist() for record in records]
    drawn = sample(model, prompts, SETTINGS, stop_ids=chat.end_of_turn_ids)
    for ids, record, row in zip(prompts, records, drawn, strict=True):
        line = lines[prompt_key(ids)]
        assert line["prompt"] == list(record.prompt) and line["sampler"] == "s"
        told = [(own["text"], own["tokens"], own["finished"]) for own in line["responses"]]
        assert told == [(chat.decode(r.ids), len(r.ids), r.finished) for r in row]
        assert [own["ids"] for own in line["responses"]] == [
            [*r.ids, *([r.stop] if r.finished else [])] for r in row
        ]
    assert counts.tokens == sum(len(r.ids) for row in drawn for r in row)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_job_cut_anywhere_goes_on_and_ends_with_the_same_bytes(
    model, chat, records, tmp_path: Path, monkeypatch
):
    """Cut inside every line and between them; no wave whose prompts are all there is answered again."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    draw(model, chat, records, whole)
    content = whole.read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    answered: list[int] = []
    genuine = files.sample

    def watched(model: Model, prompts: Any, *rest: Any, done: Any, **more: Any):
        def told(n: int, row: Any) -> None:
            answered.append(n)
            done(n, row)

        return genuine(model, prompts, *rest, done=told, **more)

    monkeypatch.setattr(files, "sample", watched)
    for size in (0, 1, *(end + step for end in ends[:-1:5] for step in (-1, 0, 30)), len(content)):
        cut.write_bytes(content[:size])
        answered.clear()
        there = sum(end <= size for end in ends)
        counts = draw(model, chat, records, cut)
        assert cut.read_bytes() == content
        assert (counts.known, len(answered)) == (there, 12 - there)


def test_waves_of_answered_prompts_are_passed_over(model, chat, records, monkeypatch):
    prompts = [chat.prompt_ids(record.prompt).tolist() for record in records]
    everything = sample(model, prompts, SETTINGS, stop_ids=[2])
    from lora_dpo.sampling import responses

    genuine, seen = responses.respond, []
    monkeypatch.setattr(responses, "respond", lambda e, p, *rest: seen.append(len(p)) or genuine(e, p, *rest))
    waves = responses.plan(model, [len(ids) for ids in prompts], SETTINGS)
    assert len(waves) >= 3
    known = {*waves[0].prompts, waves[1].prompts[0]}
    rest = sample(model, prompts, SETTINGS, stop_ids=[2], known=known)
    assert sum(seen) == 12 - len(waves[0].prompts)
    assert rest == [[] if n in known else row for n, row in enumerate(everything)]


def test_another_samplers_file_is_refused_and_left_alone(model, chat, records, tmp_path: Path):
    file = tmp_path / "responses.jsonl"
    draw(model, chat, records[:2], file)
    before = file.read_bytes()
    with pytest.raises(RunError, match=r"responses.jsonl line 1 was drawn by another sampler \(s, this one"):
        draw(model, chat, records, file, sampler="t")
    file.write_bytes(b"{}x\n" + before)
    with pytest.raises(RunError, match="line 1 is damaged"):
        draw(model, chat, records, file)
    file.write_bytes(before)
    with growing(file), pytest.raises(RunError, match="another process is writing"):
        draw(model, chat, records, file)
    with pytest.raises(RunError, match="is a folder"):
        draw(model, chat, records, tmp_path)
    assert file.read_bytes() == before


def test_the_sampler_is_the_base_the_adapter_its_role_and_what_was_set():
    one = model_of()
    usual = sampler_id(one, SETTINGS, [2])
    assert len(usual) == 16 and sampler_id(model_of(), SETTINGS, [2]) == usual
    assert sampler_id(one, Sampling(responses=2, max_new_tokens=6), [2]) == usual  # memory does not matter
    others = {
        sampler_id(one, SETTINGS, [2], role="base"),
        sampler_id(one, SETTINGS, [2, 3]),
        sampler_id(one, Sampling(responses=3, max_new_tokens=6), [2]),
        sampler_id(one, Sampling(responses=2, max_new_tokens=6, seed=1), [2]),
        sampler_id(model_of(seed=1), SETTINGS, [2]),
    }
    next(iter(one.trainable.values())).data[0] += 1
    others.add(sampler_id(one, SETTINGS, [2]))
    assert len(others) == 6 and usual not in others
    assert sampler_id(one, SETTINGS, [2], base="known") != sampler_id(one, SETTINGS, [2])


def test_prompts_that_are_too_long_are_left_out_and_counted(model, chat, records, tmp_path: Path):
    lengths = sorted(len(chat.prompt_ids(record.prompt)) for record in records)
    counts = draw(model, chat, records, tmp_path / "a.jsonl", longest=lengths[8])
    expected = sum(length > lengths[8] for length in lengths)
    assert counts.too_long == expected > 0 and counts.prompts == 12 - expected


def test_tools_and_template_arguments_stay_with_their_prompt(model, tmp_path: Path):
    template = CHATML.replace("{% for m", "{{ tone }}{{ tools[0]['name'] }}{% for m", 1)
    chat = ChatTokenizer(small_tokenizer(), template)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "the cat", "tools": [{"name": "hat"}], "chat_template_kwargs": {"tone": "red"}}
    rows.write_text(json.dumps(row) + "\n")
    file = tmp_path / "out.jsonl"
    draw(model, chat, load_prompts(Data(str(rows))).train, file)
    [line] = read(file)
    assert line["tools"] == row["tools"] and line["chat_template_kwargs"] == row["chat_template_kwargs"]
    # With a score in each response it is a preference file, and its prompt the very same.
    for n, response in enumerate(line["responses"]):
        response.update(score=float(n), text=f"answer {n}")
    rows.write_text(json.dumps(line) + "\n")
    [pair] = load_preferences(Data(str(rows))).train
    ids = chat.prompt_ids(pair.prompt, pair.tools, pair.template_kwargs)
    assert prompt_key(ids.tolist()) == line["id"]


def test_no_character_of_a_response_ends_a_line(tmp_path: Path):
    file = GrowingFile(tmp_path / "lines.jsonl")
    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x3000))))
    file.append({"text": text})
    assert read(file.file) == [{"text": text}] == [line for _, line in file.lines()]


def test_a_line_that_does_not_fit_leaves_none(tmp_path: Path, monkeypatch):
    file = GrowingFile(tmp_path / "lines.jsonl")
    file.append({"n": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunError, match=r"cannot write .*No space left"):
        file.append({"n": 2})
    monkeypatch.undo()
    assert list(file.lines()) == [(1, {"n": 1})]


PROMPT_ROWS = [
    ({"prompt": "hi"}, "hi"),
    ({"prompt": [{"role": "user", "content": "hi"}], "responses": [{"text": "a"}, {"text": "b"}]}, "hi"),
    ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "hi"),
    ({"instruction": "hi", "input": "you"}, "hi\nyou"),
    ({"question": "hi", "answer": "a"}, "hi"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "hi"),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}, "hi"),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]}, "hi"),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}, "hi"),
]


@pytest.mark.parametrize("row", PROMPT_ROWS, ids=lambda row: ",".join(row[0]))
def test_prompts_are_read_from_whatever_rows_have_one(row: Any, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row[0]]))
    [prompt] = load_prompts(Data(str(file))).train
    assert prompt.prompt == ({"role": "user", "content": row[1]},)


def test_rows_without_a_prompt_are_named(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "hi"}\n{"text": "hi"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl row 2: unknown columns: 'text'"):
        load_prompts(Data(str(file)))
    file.write_text('{"prompt": "<s> hi"}\n')
    assert [p.prompt for p in load_prompts(Data(str(file), format="text")).train] == ["<s> hi"]


# The command


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    return file


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(recipe_file: Path, tmp_path: Path):
    """SIGKILL when some lines are there; the same again in this process, against one that ran through."""
    keys = ["responses=2", "max_new_tokens=30", "tokens_in_cache=1"]
    prompts, quiet = str(tmp_path / "some.jsonl"), Display(quiet=True)
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(16)))
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    words = ["sample", str(recipe_file), "--prompts", prompts, "--output", str(killed), *keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "lora_dpo.cli", *words], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if killed.exists() and killed.read_bytes().count(b"\n") >= 3:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
    there = killed.read_bytes().count(b"\n")
    assert 3 <= there < 16
    counts = answer_prompts(recipe_file, prompts, killed, words=keys, display=quiet)
    assert (counts.known, counts.responses) == (there, 2 * (16 - there))
    answer_prompts(recipe_file, prompts, whole, words=keys, display=quiet)
    assert killed.read_bytes() == whole.read_bytes() and len(read(whole)) == 16
    again = answer_prompts(recipe_file, prompts, whole, words=keys, display=quiet)
    assert described(again) == ["16 of 16 prompts were answered before"]


def test_wrong_words_are_refused_before_anything_is_loaded(recipe_file: Path, tmp_path: Path):
    rows, file, quiet = str(tmp_path / "pairs.jsonl"), tmp_path / "o.jsonl", Display(quiet=True)
    for words, said in (
        (["temprature=2"], "unknown key sampling.temprature: did you mean sampling.temperature"),
        (["responses"], "'responses' is no key: write key=value"),
        (["base.devise=cpu"], "unknown key base.devise: did you mean base.device"),
    ):
        with pytest.raises(RecipeError, match=said):
            answer_prompts(recipe_file, rows, file, words=words, display=quiet)
    with pytest.raises(RunError, match="is not a run directory"):
        answer_prompts(tmp_path / "none", rows, file, display=quiet)


def test_the_base_of_a_recipe_and_the_policy_of_a_run_answer(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
):
    from lora_dpo.training import train

    train(recipe, quiet=True)
    keys, prompts = ["responses=2", "max_new_tokens=8"], str(tmp_path / "pairs.jsonl")
    run = Path(recipe.run_directory)
    texts = []
    for source, base in ((recipe_file, False), (run, False), (run, True)):
        file = tmp_path / f"{len(texts)}.jsonl"
        counts = answer_prompts(
            source, prompts, file, words=keys, base_only=base, limit=5, display=Display(quiet=True)
        )
        assert counts.prompts == 5 and counts.responses == 10
        texts.append({line["id"]: line["responses"] for line in read(file)})
    assert texts[0].keys() == texts[1].keys()
    assert texts[0] == texts[2] != texts[1]
