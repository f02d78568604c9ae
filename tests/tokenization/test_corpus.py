"""Many records: the same result from one process or several, and from the cache; nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from builders import small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_dpo
from lora_dpo.errors import DataError, UserError
from lora_dpo.preferences import Demonstration, Preference, Rating, Where
from lora_dpo.tokenization import ChatTokenizer, Tokenized, cache, corpus, portable, tokenize
from lora_dpo.tokenization.flat import from_bytes, to_bytes
from lora_dpo.tokenization.processes import WorkerProcess, serve, working
from lora_dpo.tokenization.work_queue import Record, WorkQueue

TEMPLATE = """{%- for m in messages %}
{%- if 'REFUSE' in m.content %}{{ raise_exception('not ' + m.content) }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LIMIT = 40


def chat_tokenizer(template: str = TEMPLATE, limit: int = LIMIT, **changes: Any) -> ChatTokenizer:
    return ChatTokenizer(small_tokenizer(), template, limit, **changes)


def record(prompt: str, *responses: str, row: int = 1, file: str = "a.jsonl") -> Record:
    ask, *answers = (
        ({"role": role, "content": text},)
        for role, text in zip(("user", "assistant", "assistant"), (prompt, *responses), strict=False)
    )
    kind: Any = Preference if len(responses) == 2 else Demonstration
    return kind(ask, *answers, Where(file, row))


def rating(prompt: str, response: str, mismatched: str | None = None, **rest: Any) -> Rating:
    one = record(prompt, response, row=rest.pop("row", 1))
    assert isinstance(one, Demonstration)
    other = None if mismatched is None else ({"role": "assistant", "content": mismatched},)
    label = rest.pop("desirable", True)
    return Rating(one.prompt, one.response, label, one.where, mismatched=other, **rest)


def plain(tokenized: Tokenized) -> tuple:
    """All that a result holds, in types that compare, order included."""
    rows = [
        (
            *(ids.tobytes() for ids in (item.prefix, *item.rests, *item.scored)),
            *(str(array.dtype) for array in (item.prefix, *item.rests, *item.scored)),
            [len(rest) for rest in item.rests],
            item.where,
            dict(item.values),
        )
        for item in tokenized.branches
    ]
    return rows, list(tokenized.dropped.items()), list(tokenized.first_dropped.items())


def attempt(work: Callable[[], Tokenized]) -> tuple:
    """The result, or the error."""
    try:
        return plain(work())
    except Exception as error:
        return type(error), str(error)


TEXTS = st.sampled_from(["the cat", "no", "<|im_end|>", "REFUSE", "é\n", "the red hat " * 8, " ", "\ud800"])
VALUES = st.dictionaries(st.sampled_from(["weight", "margin", "é"]), st.floats(allow_nan=False), max_size=2)
PAIRS = st.builds(record, TEXTS, TEXTS, TEXTS, row=st.integers(1, 99), file=st.sampled_from(["a", "é b"]))
RECORDS = st.lists(
    st.one_of(
        st.builds(lambda one, values: replace(one, values=values), PAIRS, VALUES),
        st.builds(record, TEXTS, TEXTS, row=st.integers(1, 99)),
        st.builds(
            rating,
            TEXTS,
            TEXTS,
            st.none() | TEXTS,
            row=st.integers(1, 99),
            desirable=st.booleans(),
            values=VALUES,
        ),
        # A tuple can't be sent as JSON: this one stays in the process.
        st.builds(lambda one: replace(one, template_kwargs={"x": (1,)}), st.builds(record, TEXTS, TEXTS)),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def workers():
    """Two workers that live for all tests here: starting one takes seconds."""
    living = [WorkerProcess(), WorkerProcess()]
    yield living
    for worker in living:
        worker.stop()
        worker.close()


def shared_out(
    records: list[Record], tokenizer: ChatTokenizer, skip: bool, workers: list[WorkerProcess]
) -> Tokenized:
    """`tokenize` by workers alone, as far as they can: this process does what comes back to it."""
    queue = WorkQueue(records, 2, None)
    threads = [threading.Thread(target=serve, args=(worker, queue, tokenizer, skip)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.left == 0, "the workers did nothing"
    while places := queue.next_here():
        corpus.work(queue, places, tokenizer, skip)
    return corpus._not_empty(queue.result())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS, skip=st.booleans())
def test_workers_give_what_one_process_gives_and_raise_what_it_raises(
    workers: list[WorkerProcess], records: list[Record], skip: bool
):
    tokenizer = chat_tokenizer()
    alone = attempt(lambda: tokenize(records, tokenizer, skip_refused=skip))
    assert attempt(lambda: shared_out(records, tokenizer, skip, workers)) == alone


@pytest.mark.parametrize("workers", [0, 1, None])
def test_a_short_job_and_one_process_start_no_other(workers: int | None):
    with mock.patch.object(subprocess, "Popen", side_effect=AssertionError):
        tokenize([record("a", "b", "c")] * 40, chat_tokenizer(), workers=workers)


def test_a_tokenizer_that_a_worker_would_read_otherwise_stays_in_this_process(workers: list[WorkerProcess]):
    tokenizer = chat_tokenizer()
    assert workers[0].prepare(tokenizer, False)
    with mock.patch("lora_dpo.tokenization.processes.settings_digest", return_value="another"):
        assert not workers[0].prepare(tokenizer, False)
    own = small_tokenizer()
    own.__class__ = type("Own", (type(own),), {"apply_chat_template": lambda *_, **__: "x<|im_end|>"})
    assert ChatTokenizer(own, None, LIMIT).settings() is None


def test_a_worker_that_is_killed_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch):
    queue = WorkQueue([record("a", "b", "c", row=n) for n in range(30)], 10, None)
    # It dies at its first records, before any answer.
    monkeypatch.setattr(WorkerProcess, "prepare", lambda *_: True)
    with working(queue, chat_tokenizer(), False, 1):
        child = max(psutil.Process().children(), key=lambda process: process.create_time())
        while queue.left == 30:
            time.sleep(0.01)
        child.kill()
        while places := queue.next_here():
            corpus.work(queue, places, chat_tokenizer(), False)
    with pytest.raises(
        DataError, match=r"ended by SIGKILL; the system may have run out of memory\. data.workers=1"
    ):
        queue.result()


def test_a_worker_that_cannot_start_leaves_the_work_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(corpus, "WORTH_SECONDS", 0.0)
    records = [record(f"the cat {n}", "b", "c", row=n) for n in range(60)]
    for executable in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        assert len(tokenize(records, chat_tokenizer(), workers=3).branches) == 60


# Without `if __name__ == "__main__"`, as scripts and notebooks are.
SCRIPT = """
import json, threading, time
from lora_dpo.cli import friendly_errors
from lora_dpo.preferences import Preference, Where
from lora_dpo.tokenization import corpus, processes, portable, tokenize
print("began", flush=True)
corpus.MEASURE_SECONDS = corpus.WORTH_SECONDS = 0.0
tokenizer, here, helped = portable.tokenizer_from(json.loads({settings!r})), [], threading.Event()
branches, outcomes = tokenizer.branches, processes.WorkerProcess.outcomes
def slow(record):
    here.append(record)
    if len(here) > 50:
        helped.wait()  # the worker takes seconds to start
    time.sleep({seconds})
    return branches(record)
def there(*arguments):
    if not helped.is_set():
        print("helped", flush=True)
        helped.set()
    return outcomes(*arguments)
tokenizer.branches, processes.WorkerProcess.outcomes = slow, there
with friendly_errors():
    records = [Preference("the cat", "b", "c", Where("a", n)) for n in range({count})]
    done = tokenize(records, tokenizer, workers=2)
    print(len(done.branches), len(here) < {count}, flush=True)
"""


def script(tmp_path: Path, seconds: float, count: int) -> subprocess.Popen[str]:
    file = tmp_path / "plain_script.py"
    settings = json.dumps(chat_tokenizer().settings())
    file.write_text(SCRIPT.format(settings=settings, seconds=seconds, count=count))
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    place = os.environ | {"PYTHONPATH": str(Path(lora_dpo.__file__).parents[1])}
    return subprocess.Popen([sys.executable, str(file)], env=place, start_new_session=True, **pipes)


def test_a_script_without_a_main_guard_shares_a_long_job_and_runs_once(tmp_path: Path):
    with script(tmp_path, 0.0, 3000) as job:
        assert job.communicate(timeout=60) == ("began\nhelped\n3000 True\n", "")
        assert job.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_ends_at_once_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, code: int
):
    with script(tmp_path, 0.1, 100_000) as job:
        assert job.stdout is not None
        assert [job.stdout.readline() for _ in range(2)] == ["began\n", "helped\n"]
        (worker,) = psutil.Process(job.pid).children()
        os.killpg(job.pid, number)  # what a terminal does
        said = job.communicate(timeout=60)[1]
        assert (
            said
            == "stopped; nothing half-written is in its place, the same command goes on or begins again\n"
        )
        assert job.returncode == code
        worker.wait(timeout=60)


# The cache


def counted(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> list[Where]:
    """The places that are tokenized from now on."""
    seen: list[Where] = []
    branches = tokenizer.branches
    monkeypatch.setattr(tokenizer, "branches", lambda one: (seen.append(one.where), branches(one))[1])
    return seen


MIXED = [
    record("the cat", "b", "c", row=1),
    record("the hat", "same", "same", row=2),
    record("é" * 90, "b", "c", row=3, file="\ud800.jsonl"),
    record("REFUSE", "b", "c", row=4),
    record("the sun", "alone", row=5),
    rating("the dog", "yes", "no", row=6, desirable=False, values={"weight": 0.1}),
    replace(record("the mat", "b", "c", row=7), values={"weight": 0.0, "margin": -0.5}),
]


def test_what_was_tokenized_is_read_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = tokenize(MIXED, chat_tokenizer(), skip_refused=True, cache=tmp_path)
    tokenizer, heard = chat_tokenizer(), []
    seen = counted(tokenizer, monkeypatch)
    again = tokenize(MIXED, tokenizer, heard.append, skip_refused=True, cache=tmp_path)
    assert (first.cached, again.cached, seen, heard) == (False, True, [], [7])
    assert plain(again) == plain(first) == plain(tokenize(MIXED, tokenizer, skip_refused=True))
    assert again.describe_dropped() == first.describe_dropped()
    again.branches[0].prefix[0] += 1  # as writable as the first
    assert len(again.dropped) == 2


@settings(max_examples=30, deadline=None)
@given(records=RECORDS)
def test_branches_travel_unchanged(records: list[Record]):
    try:
        branches = tokenize([r for r in records if "REFUSE" not in str(r)], chat_tokenizer()).branches
    except (UserError, UnicodeError, TypeError):
        branches = []
    found, facts = from_bytes(to_bytes(branches, {"a": [1, None]}))
    empty = Tokenized([], Counter(), {})
    assert plain(replace(empty, branches=found)) == plain(replace(empty, branches=branches))
    assert facts == {"a": [1, None]}


def more_tokens(kind: str) -> ChatTokenizer:
    tokenizer = small_tokenizer()
    if kind == "token":
        tokenizer.add_tokens(["cat"])
    else:
        tokenizer.eos_token = "<|endoftext|>"
    return ChatTokenizer(tokenizer, TEMPLATE, LIMIT)


BASIS = record("the cat", "b", "c")
TOOL = {"function": {"name": "f"}}
DECIDING: dict[str, Callable[[], tuple[Any, ...]]] = {
    "prompt": lambda: (record("the hat", "b", "c"), chat_tokenizer()),
    "role": lambda: (replace(BASIS, prompt=({"role": "system", "content": "the cat"},)), chat_tokenizer()),
    "chosen": lambda: (record("the cat", "d", "c"), chat_tokenizer()),
    "the sides' order": lambda: (record("the cat", "c", "b"), chat_tokenizer()),
    "a side less": lambda: (record("the cat", "b"), chat_tokenizer()),
    "weight": lambda: (replace(BASIS, values={"weight": 2.0}), chat_tokenizer()),
    "margin": lambda: (replace(BASIS, values={"margin": 2.0}), chat_tokenizer()),
    "a weight of 1": lambda: (replace(BASIS, values={"weight": 1.0}), chat_tokenizer()),
    "a rating": lambda: (rating("the cat", "b"), chat_tokenizer()),
    "its label": lambda: (rating("the cat", "b", desirable=False), chat_tokenizer()),
    "its mismatched response": lambda: (rating("the cat", "b", "c"), chat_tokenizer()),
    "another one": lambda: (rating("the cat", "b", "d"), chat_tokenizer()),
    "rendered text": lambda: (Preference("the cat", "b", "c", BASIS.where), chat_tokenizer()),
    "tools": lambda: (replace(BASIS, tools=(TOOL,)), chat_tokenizer()),
    "template_kwargs": lambda: (replace(BASIS, template_kwargs={"x": 1}), chat_tokenizer()),
    "their types": lambda: (replace(BASIS, template_kwargs={"x": True}), chat_tokenizer()),
    "file": lambda: (record("the cat", "b", "c", file="b.jsonl"), chat_tokenizer()),
    "row": lambda: (record("the cat", "b", "c", row=2), chat_tokenizer()),
    "template": lambda: (BASIS, chat_tokenizer(TEMPLATE + " ")),
    "max_tokens": lambda: (BASIS, chat_tokenizer(limit=LIMIT + 1)),
    "max_prompt_tokens": lambda: (BASIS, chat_tokenizer(max_prompt_tokens=LIMIT - 1)),
    "an added token": lambda: (BASIS, more_tokens("token")),
    "the EOS": lambda: (BASIS, more_tokens("eos")),
}


def test_whatever_decides_the_result_decides_the_key(monkeypatch: pytest.MonkeyPatch):
    def key(one: Record, tokenizer: ChatTokenizer, skip: bool = False) -> str | None:
        return portable.corpus_key([one], tokenizer, skip)

    keys = {name: key(*build()) for name, build in DECIDING.items()}
    keys["nothing"] = key(BASIS, chat_tokenizer())
    keys["skip_refused"] = key(BASIS, chat_tokenizer(), skip=True)
    keys["twice"] = portable.corpus_key([BASIS, BASIS], chat_tokenizer(), False)
    monkeypatch.setattr(portable, "TOKENIZATION", portable.TOKENIZATION + 1)
    keys["version"] = key(BASIS, chat_tokenizer())
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)
    monkeypatch.undo()
    assert key(BASIS, chat_tokenizer()) == keys["nothing"]
    assert key(replace(BASIS, template_kwargs={"x": (1,)}), chat_tokenizer()) is None


def test_a_template_that_writes_the_date_is_not_read_from_another_day(monkeypatch: pytest.MonkeyPatch):
    dated = chat_tokenizer("{{ strftime_now('%d') }}" + TEMPLATE)
    keys = [portable.corpus_key([BASIS], tokenizer, False) for tokenizer in (dated, chat_tokenizer())]
    monkeypatch.setattr(portable, "date", mock.Mock(**{"today.return_value.isoformat.return_value": "then"}))
    assert portable.corpus_key([BASIS], dated, False) != keys[0]
    assert portable.corpus_key([BASIS], chat_tokenizer(), False) == keys[1]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_tokenized_anew(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("damaged")
    whole = plain(tokenize(MIXED, chat_tokenizer(), skip_refused=True, cache=folder))
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    file.write_bytes(content)
    again = tokenize(MIXED, chat_tokenizer(), skip_refused=True, cache=folder)
    assert plain(again) == whole
    assert tokenize(MIXED, chat_tokenizer(), skip_refused=True, cache=folder).cached


def test_a_file_under_another_key_is_not_read(tmp_path: Path):
    tokenize(MIXED, chat_tokenizer(), skip_refused=True, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    key = portable.corpus_key(MIXED[:1], chat_tokenizer(), False)
    file.rename(tmp_path / f"{key}.safetensors")
    assert not tokenize(MIXED[:1], chat_tokenizer(), cache=tmp_path).cached


def test_errors_are_met_anew(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl row 4: the chat template refuses"):
            tokenize(MIXED, chat_tokenizer(), cache=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("locks", [True, False])
def test_several_at_once_are_all_right_and_with_locks_one_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
):
    if not locks:
        monkeypatch.setattr(cache.FileLock, "acquire", mock.Mock(side_effect=NotImplementedError))
    tokenizers = [chat_tokenizer() for _ in range(4)]
    seen = [counted(tokenizer, monkeypatch) for tokenizer in tokenizers]
    records = [record(f"the cat {n}", "b", "c", row=n) for n in range(100)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda one: plain(tokenize(records, one, cache=tmp_path)), tokenizers))
    assert all(result == results[0] for result in results)
    assert sum(map(len, seen)) == 100 if locks else sum(map(len, seen)) >= 100
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path):
    (tmp_path / "file").write_text("")
    expected = plain(tokenize(MIXED[:1], chat_tokenizer()))
    assert plain(tokenize(MIXED[:1], chat_tokenizer(), cache=tmp_path / "file" / "folder")) == expected
    full = OSError(28, "No space left on device")
    with mock.patch.object(os, "fsync", side_effect=full):
        assert plain(tokenize(MIXED[:1], chat_tokenizer(), cache=tmp_path)) == expected
    assert not [*tmp_path.glob(".*"), *tmp_path.glob("*.safetensors")]


def test_the_folder_stays_bounded_and_keeps_what_was_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def put(n: int) -> Tokenized:
        return tokenize([record(f"the cat {n}", "b", "c")], chat_tokenizer(), cache=tmp_path)

    monkeypatch.setattr(cache, "MOST_FILES", 3)
    for n in range(3):
        put(n)
        for file in tmp_path.iterdir():  # each a minute older than the next
            minute_ago = file.stat().st_mtime - 60
            os.utime(file, (minute_ago, minute_ago))
    old = tmp_path / ".killed.part"
    old.write_text("")
    os.utime(old, (0, 0))
    assert put(0).cached
    put(3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert put(0).cached
    assert not old.exists()
    assert not put(1).cached
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    put(4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert put(4).cached
