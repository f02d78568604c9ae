"""Where exports go: into a new folder of their own; and what one that is refused leaves."""

from __future__ import annotations

import errno
import json
import os
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import pair_rows
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.errors import DataError, ModelError, RecipeError, RunError
from lora_dpo.export import Options, Source, export, export_adapter, export_merged, find_source, kinds
from lora_dpo.export.gguf import check as gguf_check
from lora_dpo.export.merging import files
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.run_directory import RunDirectory, damage, grow_folder
from lora_dpo.training import Display, train


@pytest.fixture(scope="module")
def run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(20)))
    recipe = Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(folder / "pairs.jsonl"), eval_last=4),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=8, max_steps=2, learning_rate=1e-2, save_every=1),
        run_directory=str(folder / "run"),
    )
    return train(recipe, quiet=True)


@pytest.fixture(scope="module")
def source(run: RunDirectory) -> Source:
    return find_source(run.path)


def names(folder: Path) -> set[str]:
    """What lies in a folder, beside the tests' cache."""
    return {file.name for file in folder.iterdir()} - {"cache"}


# ---- the folder


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf", "gguf-adapter", "ollama"])
@pytest.mark.parametrize("place", ["adapter/merged", "checkpoints/mine", "adapter/a/b", "evaluation.json"])
def test_nothing_is_exported_into_what_a_run_owns(source: Source, run: RunDirectory, kind: Any, place: str):
    with pytest.raises(RunError, match=r"would lie in .*--output"):
        export(source, kind, run.path / place)
    assert damage(run.adapter_folder) is None
    assert not (run.path / place).exists()


def test_nothing_is_exported_into_an_adapter_or_another_export(source: Source, tmp_path: Path):
    bare = export_adapter(source, tmp_path / "bare")
    with pytest.raises(RunError, match=r"would lie in .*bare, an adapter's folder"):
        export(find_source(bare), "merged", bare / "merged")
    whole = export(source, "merged", tmp_path / "whole", Options(verify=False))
    with pytest.raises(RunError, match=r"would lie in .*whole, an earlier export"):
        export(source, "adapter", tmp_path / "whole" / "adapter")
    assert not [file for file in (*bare.iterdir(), *whole.iterdir()) if file.is_dir()]


def test_what_is_in_the_way_is_called_what_it_is(source: Source, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    said = {
        "file": "file is a file: choose",
        "full": "full is there already and is not empty: choose",
        "nowhere": "nowhere is a link that leads nowhere: choose",
        "link": "link is a link: choose",
        "file/below/x": "x cannot be made: .*file is no folder: choose",
        "nowhere/x": "x cannot be made: .*nowhere is no folder: choose",
        "two\nlines": r"--output got '.*two\\nlines': such characters",
        "x" * 300: "File name too long: choose",
    }
    for place, words in said.items():
        with pytest.raises(RunError, match=words):
            export(source, "adapter", tmp_path / place)
    assert names(tmp_path) == {"file", "full", "nowhere", "link"}


def test_a_folder_that_cannot_be_written_is_one_line(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Any, *given: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(RunError) as error:
        export_adapter(source, tmp_path / "out")
    assert str(error.value) == f"cannot write {tmp_path / 'out'}: Permission denied"


# ---- what is left


def test_an_adapter_that_is_refused_leaves_nothing(source: Source, tmp_path: Path):
    bare = export_adapter(source, tmp_path / "bare")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ModelError):
        export_merged(find_source(bare), tmp_path / "merged")
    assert names(tmp_path) == {"bare"}


def test_values_that_do_not_fit_the_dtype_leave_nothing(source: Source, tmp_path: Path):
    bare = export_adapter(source, tmp_path / "bare")
    tensors = load_file(bare / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] + 1e6}, bare / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit float16"):
        export_merged(find_source(bare), tmp_path / "merged", Options(dtype="float16"))
    assert names(tmp_path) == {"bare"}


def test_a_folder_that_grew_is_kept_for_the_next_call_and_an_empty_one_is_not(tmp_path: Path):
    def fill(part: Path) -> None:
        if filling:
            (part / "shard").touch()
        raise ModelError("refused")

    for filling in (False, True):
        with pytest.raises(ModelError, match="refused"):
            grow_folder(tmp_path / "out", fill)
        assert (tmp_path / ".out.part").exists() == filling
    with pytest.raises(ModelError, match="refused"):
        grow_folder(tmp_path / "out", fill, fresh=True)
    assert names(tmp_path) == set()


def test_a_hidden_folder_that_is_a_link_is_not_written_through(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / ".out.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is a link"):
        grow_folder(tmp_path / "out", lambda part: None, fresh=True)
    assert (tmp_path / "elsewhere" / "mine").exists()


FAILS = """
import sys
if "convert_hf" in sys.argv[0]:
    print("no tokenizer that I know")
    sys.exit(1)
"""


def test_a_failed_conversion_says_what_waits_and_the_next_call_goes_on_with_it(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tools = tmp_path / "llama.cpp"
    tools.mkdir()
    (tools / "convert_hf_to_gguf.py").write_text(FAILS)
    options = Options(dtype="float32", verify=False, llama_cpp=tools)
    merged = tmp_path / ".out.part" / "merged"
    with pytest.raises(ModelError, match=f"status 1.*\nno tokenizer.*\nThe merged model waits in {merged}:"):
        export(source, "gguf", tmp_path / "out", options)
    assert (merged / "model.safetensors").is_file() and not (tmp_path / "out").exists()
    written: list[Path] = []
    monkeypatch.setattr(files, "write_shard", lambda file, *given: written.append(file))
    monkeypatch.setattr(gguf_check, "package_is_there", lambda: False)
    monkeypatch.setattr(kinds, "write_modelfile", lambda *given, **named: SimpleNamespace(describe=list))
    (tools / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF')"
    )
    export(source, "gguf", tmp_path / "out", options)
    assert written == [], "it was merged again"
    assert (tmp_path / "out" / "run-float32.gguf").read_bytes() == b"GGUF"
    assert names(tmp_path) == {"llama.cpp", "out"}


def test_without_llama_cpp_every_line_that_is_needed_is_said(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModelError) as error:
        export(source, "gguf", tmp_path / "my out", Options(dtype="float16"))
    lines = [shlex.split(line) for line in str(error.value).splitlines()[3:6]]
    merge, make, convert = lines
    merged = str(tmp_path / "my out-merged")
    assert merge[:2] == ["lora-dpo", "export"] and merge[-2:] == ["--output", merged]
    assert make == ["mkdir", "-p", str(tmp_path / "my out")]
    assert convert[:4] == ["python", "llama.cpp/convert_hf_to_gguf.py", merged, "--outfile"]
    # The first line is a command that is taken as it is.
    done = CliRunner().invoke(app, [*merge[1:], "--no-verify"])
    assert done.exit_code == 0, done.exception
    assert json.loads((Path(merged) / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(ModelError, match=rf"mkdir -p '{tmp_path}/my out'\n  python llama.cpp/convert_lora"):
        export(source, "gguf-adapter", tmp_path / "my out")


def test_rows_that_cannot_be_read_are_said_before_the_merge(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    monkeypatch.setattr(files, "write_shard", lambda *given: pytest.fail("it was merged first"))
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        export(source, "merged", tmp_path / "out", Options(data=str(tmp_path / "rows.jsonl")))
    assert names(tmp_path) == {"rows.jsonl"}


# ---- two at once


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_of_two_exports_to_one_folder_one_is_refused_and_the_other_whole(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
):
    """The second begins while the first one is filling its folder."""
    from lora_dpo.export import adapter, making

    module, name = (adapter, "_fill") if kind == "adapter" else (making, "merge_and_prove")
    inside, go_on, real = threading.Event(), threading.Event(), getattr(module, name)

    def slowly(*given: Any) -> Any:
        made = real(*given)
        inside.set()
        assert go_on.wait(60)
        return made

    monkeypatch.setattr(module, name, slowly)
    first = threading.Thread(target=export, args=(source, kind, tmp_path / "out", Options(verify=None)))
    first.start()
    assert inside.wait(60)
    with pytest.raises(RunError, match="another process is writing"):
        export(source, kind, tmp_path / "out")
    go_on.set()
    first.join()
    assert names(tmp_path) == {"out"}
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]
    assert (tmp_path / "out" / "README.md").is_file()


def test_an_export_that_comes_second_does_not_replace_the_first(tmp_path: Path, source: Source):
    """It looked for the folder before the first one was done, and gets the lock after."""

    def quicker(part: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    from unittest import mock

    from lora_dpo.export import adapter

    real = adapter.grow_folder

    def after_another(to: Path, fill: Any, **named: Any) -> None:
        quicker(to)
        real(to, fill, **named)

    with (
        mock.patch.object(adapter, "grow_folder", after_another),
        pytest.raises(RunError, match="is there already and is not empty"),
    ):
        export_adapter(source, tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


# ---- what is said


def test_where_an_adapter_went_is_said_before_how_to_serve_it(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export(source, "adapter", tmp_path / "out", display=Display())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"adapter: {tmp_path / 'out'}"
    assert any(line.startswith("vllm serve ") for line in lines)
    assert not any("import" in line for line in lines), "Python is for the card"
    assert "PeftModel" in (tmp_path / "out" / "README.md").read_text()


# ---- options


@pytest.mark.parametrize(
    "words",
    [
        "--to merged --public",
        "--to merged --no-verify --data x",
        "--to merged --no-verify --examples 3",
        "--to merged --llama-cpp x",
        "--to adapter --dtype fp32",
        "--to adapter --dtype bf16",  # also where it is the default
        "--to adapter --base original",
        "--to adapter --shard-size 2GB",
        "--to adapter --accept",
        "--to adapter --data x",
        "--to gguf --shard-size 2GB",
        "--to gguf-adapter --verify",
        "--to gguf-adapter --data x",
    ],
)
def test_an_option_without_effect_is_refused(words: str, tmp_path: Path):
    done = CliRunner().invoke(app, ["export", str(tmp_path), *words.split()])
    assert isinstance(done.exception, RecipeError)
    option = words.split("--")[-1].split()[0]
    assert "has no effect" in str(done.exception) and f"--{option}" in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize(
    "words",
    [
        "--to adapter --verify --data x --examples 3 --accept",
        "--to merged --no-verify --accept --dtype fp32 --shard-size 1GB --base original",
        "--to gguf --data x --examples 2 --llama-cpp x --dtype fp16 --accept",
        "--to gguf-adapter --llama-cpp x --accept",
        "--to ollama --base original --data x --shard-size 1GB",
    ],
)
def test_options_with_effect_are_taken(words: str, tmp_path: Path):
    done = CliRunner().invoke(app, ["export", str(tmp_path), *words.split()])
    assert isinstance(done.exception, ModelError) and "no adapter_config.json" in str(done.exception)


@pytest.mark.parametrize("words", [["", "--to", "merged"], ["x", "--to", "merged", "--output", " "]])
def test_an_empty_path_is_refused(words: list[str]):
    done = CliRunner().invoke(app, ["export", *words])
    assert isinstance(done.exception, RecipeError) and "it takes a folder" in str(done.exception)
