"""What lies on disk is whole or not there, and whatever is not as it was written is seen."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from builders import small_tokenizer

from lora_dpo.errors import RunError
from lora_dpo.run_directory import MANIFEST, RunDirectory, damage, need_space, write_folder, write_text
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training.keeping import Checkpoints
from lora_dpo.training.progress import Display


def fill(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(bytes(range(40)))
    (folder / "state.json").write_text('{"step": 3}')


def whole(folder: Path) -> Path:
    write_folder(folder, fill, manifest=True)
    assert damage(folder) is None
    return folder


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def test_every_flipped_bit_and_every_shorter_file_is_seen(tmp_path: Path):
    folder = whole(tmp_path / "step-000001")
    for file in (folder / "adapter" / "weights", folder / "state.json", folder / MANIFEST):
        content = file.read_bytes()
        for place in range(len(content)):
            for bit in (0, 5, 7):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                file.write_bytes(changed)
                assert damage(folder), (file.name, place, bit)
            file.write_bytes(content[:place])
            assert damage(folder), (file.name, "cut", place)
        file.write_bytes(content + b"\n")
        assert damage(folder), (file.name, "longer")
        file.write_bytes(content)
        assert damage(folder) is None


def test_every_missing_and_every_extra_thing_is_seen(tmp_path: Path):
    folder = whole(tmp_path / "step-000001")
    changes = {
        "missing": lambda f: (f / "adapter" / "weights").unlink(),
        "missing folder": lambda f: shutil.rmtree(f / "adapter"),
        "no manifest": lambda f: (f / MANIFEST).unlink(),
        "extra": lambda f: (f / "extra").write_text("x"),
        "hidden": lambda f: (f / "adapter" / ".hidden").write_text(""),
        "empty folder": lambda f: (f / "empty").mkdir(),
        "a manifest below": lambda f: (f / "adapter" / MANIFEST).write_text("{}"),
        "link": lambda f: (f / "link").symlink_to(f / "state.json"),
        "fifo": lambda f: os.mkfifo(f / "fifo"),
        "file for folder": lambda f: (shutil.rmtree(f / "adapter"), (f / "adapter").write_text("x")),
        "folder for file": lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
        "renamed": lambda f: (f / "state.json").rename(f / "state.JSON"),
        "link for file": lambda f: (
            (f / "state.json").rename(f.parent / "elsewhere"),
            (f / "state.json").symlink_to(f.parent / "elsewhere"),
        ),
        "deep manifest": lambda f: (f / MANIFEST).write_text("[" * 100_000),
        "manifest that leads out": lambda f: (f / MANIFEST).write_text('{"files": {"../../x": {}}}'),
    }
    for name, change in changes.items():
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        assert damage(copy) is None
        change(copy)
        assert damage(copy), name
        shutil.rmtree(copy)


def test_the_damage_is_named(tmp_path: Path):
    folder = whole(tmp_path / "step-000001")
    (folder / "state.json").write_text('{"step": 4}')
    assert damage(folder) == "state.json is changed"
    (folder / "adapter" / "weights").unlink()
    (folder / "adapter" / "more").write_text("")
    assert (
        damage(folder)
        == "adapter/weights is missing; state.json is changed; adapter/more is not in its manifest"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("bug")])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, error: BaseException
):
    folder = whole(tmp_path / "adapter")

    def broken(part: Path) -> None:
        fill(part)
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        write_folder(folder, broken, manifest=True)
    assert damage(folder) is None
    assert litter(tmp_path) == []


def test_a_folder_whose_place_cannot_be_synced_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsynced(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "input/output error")

    for before in (False, True):
        with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot write"):
            patch.setattr("lora_dpo.run_directory.writing.sync", unsynced)
            write_folder(tmp_path / "adapter", fill)
        assert (tmp_path / "adapter").exists() == before
        assert litter(tmp_path) == []
        if not before:
            whole(tmp_path / "adapter")
    assert damage(tmp_path / "adapter") is None


def test_a_process_that_died_between_two_renames_loses_neither(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    whole(run.adapter_folder)
    os.replace(run.adapter_folder, run.path / ".adapter.old")
    (run.path / ".adapter.part").mkdir()
    (run.checkpoints_folder / ".step-000004.gone").mkdir()
    (run.path / ".recipe.yaml.part").write_text("half")
    run.sweep()
    assert damage(run.adapter_folder) is None
    assert litter(run.path) == []


def test_other_peoples_files_in_a_run_directory_are_left_alone(tmp_path: Path):
    names = [".vimrc.old", ".x.part", ".config.gone", "adapter.old", ".export-merged.part"]
    for name in names:
        (tmp_path / name).write_text("mine")
    run = RunDirectory.create(tmp_path)
    (run.checkpoints_folder / ".notes.part").write_text("mine")
    run.sweep()
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert (run.checkpoints_folder / ".notes.part").exists()


def test_only_folders_named_for_a_step_are_checkpoints_and_steps_are_numbers(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    for name in ("step-000100-keep", "step-12", "steps", "step-00001x"):
        (run.checkpoints_folder / name).mkdir()
    kept = Checkpoints(run, keep=1)
    for step in (999_999, 1_000_000):
        kept.written(whole(run.checkpoint_folder(step)), None)
    assert run.checkpoints() == [run.checkpoint_folder(1_000_000)]
    assert (run.checkpoints_folder / "step-000100-keep").is_dir()


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "recipe.yaml"
    write_text(file, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"recipe\.yaml: No space left"):
        patch.setattr(os, "fsync", full)
        write_text(file, "new")
    assert file.read_text() == "old"
    assert litter(tmp_path) == []


def test_no_older_checkpoint_goes_before_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDirectory.create(tmp_path / "run")
    kept = Checkpoints(run, keep=1)
    kept.written(whole(run.checkpoint_folder(1)), None)
    broken = whole(run.checkpoint_folder(2))
    (broken / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"not as it was written: state\.json is changed"):
        kept.written(broken, None)
    assert damage(run.checkpoint_folder(1)) is None


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    for step in (2, 4, 6):
        whole(run.checkpoint_folder(step))
    for step in (4, 6):
        (run.checkpoint_folder(step) / "state.json").unlink()
    kept, said = Checkpoints(run, keep=2), []
    assert kept.newest(said.append) == run.checkpoint_folder(2)
    assert said == [f"passed over step-00000{n}: state.json is missing" for n in (6, 4)]
    kept.written(whole(run.checkpoint_folder(3)), None)
    assert run.checkpoints() == [run.checkpoint_folder(2), run.checkpoint_folder(3)]


def test_the_newest_and_the_best_stay(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    kept, best = Checkpoints(run, keep=2), run.checkpoint_folder(1)
    for step in range(1, 6):
        kept.written(whole(run.checkpoint_folder(step)), best)
    assert [path.name[-1] for path in run.checkpoints()] == ["1", "4", "5"]
    assert litter(run.path) == []


def test_metrics_are_cut_back_to_a_step_and_damaged_lines_are_told(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_record({"step": step, "kind": "step", "loss": float("nan") if step == 2 else 0.5})
        run.append_record({"step": step, "kind": "evaluation", "eval/loss": 0.5})
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    run.metrics_file.write_bytes(lines[0] + b"\xff{not json\n" + b"".join(lines[2:]) + b'{"step": 4, "ki')
    assert run.drop_records_after(3, evaluated=False) == [2]
    assert [(r["step"], r["kind"]) for r in run.records()] == [
        (1, "step"),
        (2, "step"),
        (2, "evaluation"),
        (3, "step"),
    ]
    assert next(r for r in run.records() if r["step"] == 2)["loss"] is None


def test_a_record_that_does_not_fit_on_the_disk_leaves_whole_lines(tmp_path: Path):
    import resource
    import signal

    run = RunDirectory.create(tmp_path / "run")
    run.append_record({"step": 1, "kind": "step"})
    before = run.metrics_file.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limit[1]))
    try:
        with pytest.raises(RunError, match="metrics"):
            run.append_record({"step": 2, "kind": "step"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.metrics_file.read_bytes() == before


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**33, 2**33 - 2**30, 2**30))
    need_space(tmp_path / "not" / "there", 2**29, "the run")
    with pytest.raises(RunError, match=r"the run takes 3\.0 GiB, and 1\.0 GiB are free"):
        need_space(tmp_path / "not" / "there", 3 * 2**30, "the run")


def test_a_closed_terminal_does_not_reach_the_run(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        display = Display()
        display.say("nobody reads this")
        display.say("nor this")
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())  # what is buffered goes there at close


def test_a_tokenizer_that_cannot_be_written_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tokenizers library says it by an exception that is of no type of its own."""
    chat = ChatTokenizer(small_tokenizer())

    def full(folder: str) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(chat._tokenizer, "save_pretrained", full)
    with pytest.raises(RunError, match=r"cannot write .*adapter.*No space left"):
        write_folder(tmp_path / "adapter", chat.save)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_answered_while_a_line_is_written_does_not_reach_the_run(
    monkeypatch: pytest.MonkeyPatch,
):
    class Writing:
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

        def flush(self) -> None:
            self.write("")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stdout", Writing())
    Display().say("stopping after this step")
