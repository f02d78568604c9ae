"""What a person types and reads: exit codes, one line an error, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import pair_rows

SCRIPT = """
from lora_dpo import Adapter, Base, Data, Recipe, Training, run
recipe = Recipe(
    base=Base({model!r}, compute_dtype="float32"),
    data=Data({data!r}, eval_last=8),
    adapter=Adapter(rank=4),
    training=Training(pairs_per_step=8, max_steps=2, learning_rate=1e-2),
    run_directory={run!r},
)
if __name__ == "__main__":
    run(recipe)
"""


@pytest.fixture
def script(small_model: Path, tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(30)))
    file = tmp_path / "recipe.py"
    values = {"model": str(small_model), "data": str(tmp_path / "pairs.jsonl"), "run": str(tmp_path / "run")}
    file.write_text(SCRIPT.format(**values))
    return file


def call(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )


def lora_dpo(*words: object) -> subprocess.CompletedProcess[str]:
    return call("-m", "lora_dpo.cli", *words)


def test_train_evaluate_and_export_by_the_commands(script: Path, tmp_path: Path):
    trained = call(script, "loss.beta=0.3")
    assert trained.returncode == 0, trained.stderr
    assert "preflight: policy = reference at the start" in trained.stdout
    assert f"lora-dpo eval {tmp_path / 'run'}" in trained.stdout
    assert "beta: 0.3" in (tmp_path / "run" / "recipe.yaml").read_text()
    evaluated = lora_dpo("eval", tmp_path / "run", "--samples", 2, "--max-new-tokens", 5)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "rewards/accuracy" in evaluated.stdout
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 2
    for kind, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        exported = lora_dpo("export", tmp_path / "run", "--to", kind)
        assert exported.returncode == 0, exported.stderr
        assert (tmp_path / "run" / f"export-{kind}" / file).is_file()
    assert "reloaded and compared with base + adapter on 8 examples" in exported.stdout
    assert "passed: the exported model is what was trained" in exported.stdout


def test_a_wrong_key_is_one_line_and_exit_status_2(script: Path):
    for done in (
        call(script, "training.lerning_rate=1"),
        lora_dpo("train", script, "training.lerning_rate=1"),
    ):
        assert done.returncode == 2
        assert done.stderr.strip() == (
            "error: unknown key training.lerning_rate: did you mean training.learning_rate?"
        )
        assert done.stdout == ""


def test_a_bad_row_is_one_line_with_file_and_row(script: Path, tmp_path: Path):
    with (tmp_path / "pairs.jsonl").open("a") as rows:
        rows.write('{"prompt": "a", "chosen": "b"}\n')
    done = lora_dpo("train", script)
    assert done.returncode == 2
    assert "pairs.jsonl row 31" in done.stderr
    assert "Traceback" not in done.stderr
    done = lora_dpo("train", script, "data.on_bad_row=skip")
    assert done.returncode == 0, done.stderr
    assert "1 row skipped" in done.stdout


def test_help_of_a_recipe_script_lists_every_key(script: Path):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "training.learning_rate=0.01" in done.stdout
    assert "--resume" in done.stdout


def test_a_script_that_is_no_python_is_one_line_with_its_place(tmp_path: Path):
    (tmp_path / "bad.py").write_text("recipe = 1\nsyntax(\n")
    done = lora_dpo("train", tmp_path / "bad.py")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'bad.py'}, line 2: '(' was never closed\n"


def test_accept_takes_no_other_option_for_its_value(script: Path):
    done = call(script, "--accept", "--resume")
    assert done.returncode == 2
    assert "--accept takes what is meant to differ" in done.stderr


@pytest.mark.parametrize(
    "words", [("eval", "nowhere"), ("export", "nowhere", "--to", "merged"), ("train", "no.yaml")]
)
def test_a_folder_or_file_that_is_not_there_is_exit_status_2(words: tuple[str, ...]):
    done = lora_dpo(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_ctrl_c_ends_with_status_130_and_says_how_to_go_on(script: Path, tmp_path: Path):
    import signal

    words = [sys.executable, str(script), "training.max_steps=null", "training.epochs=5000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["kind"] == "step"
    assert (tmp_path / "run" / "checkpoints" / f"step-{last['step']:06d}").is_dir()
