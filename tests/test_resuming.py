"""A resumed run is the run that began: what changed is named and refused, unless it is meant."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_small_model
from safetensors.torch import load_file, save_file

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.recipe import Recipe, load_recipe, override
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import Record, Stopped, train
from lora_dpo.training import trainer as trainer_module
from lora_dpo.training.checkpoint import read_state


@pytest.fixture
def begun(recipe: Recipe) -> Recipe:
    """A run that was stopped after its second step of six."""
    return stopped_after(2, recipe)


def stopped_after(step: int, recipe: Recipe) -> Recipe:
    def stop(record: Record) -> None:
        if record.kind == "step" and record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe, observers=[stop], quiet=True)
    return recipe


def rows_file(recipe: Recipe) -> Path:
    return Path(str(recipe.data.train))


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.run_directory))


def adapter_bytes(run: RunDirectory) -> bytes:
    return (run.adapter_folder / "adapter_model.safetensors").read_bytes()


def change_row(recipe: Recipe, number: int, **values: str) -> None:
    lines = rows_file(recipe).read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | values)
    rows_file(recipe).write_text("".join(line + "\n" for line in lines))


def test_a_changed_row_is_named_and_goes_on_only_where_it_is_meant(begun: Recipe):
    change_row(begun, 7, chosen="the red sun")
    with pytest.raises(RunError, match=r"training data.*differs is .*pairs\.jsonl row 7.*--accept data"):
        train(begun, resume=True, quiet=True)
    run = train(begun, resume=True, accept=["data"], quiet=True)
    changes = read_state(run.checkpoint_folder(6)).changes
    assert len(changes) == 1
    assert changes[0].startswith("after step 2: data: ")
    train(begun, resume=True, quiet=True)  # from here on these are its data


def test_fewer_rows_and_another_order_are_named(begun: Recipe):
    lines = rows_file(begun).read_text().splitlines(keepends=True)
    rows_file(begun).write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(RunError, match="the same examples, in another order"):
        train(begun, resume=True, quiet=True)
    rows_file(begun).write_text("".join(lines[:30] + lines[32:]))
    with pytest.raises(RunError, match=r"32 examples then, 30 now.*number 31 and what follows are gone"):
        train(begun, resume=True, quiet=True)


def test_changed_held_out_rows_are_named_as_such(begun: Recipe):
    change_row(begun, 40, rejected="the sun")
    with pytest.raises(RunError, match=r"data\.eval: the held-out data.*row 40.*--accept data\.eval"):
        train(begun, resume=True, quiet=True)
    train(begun, resume=True, accept=["data.eval"], quiet=True)


def test_a_changed_key_is_named_and_goes_on_only_where_it_is_meant(begun: Recipe):
    longer = override(begun, ["training.max_steps=8", "loss.beta=0.2"])
    with pytest.raises(RunError, match=r"loss\.beta: 0\.1 → 0\.2; training\.max_steps: 6 → 8"):
        train(longer, resume=True, quiet=True)
    with pytest.raises(RunError, match=r"began\. loss\.beta") as raised:
        train(longer, resume=True, accept=["training.max_steps"], quiet=True)
    assert "max_steps" not in str(raised.value)
    run = train(longer, resume=True, accept=["training", "loss.beta"], quiet=True)
    assert [r["step"] for r in run.records() if r["kind"] == "step"] == list(range(1, 9))
    assert load_recipe(run.recipe_file) == longer


def test_other_weights_in_the_bases_folder_are_named(recipe: Recipe, tmp_path: Path):
    folder = save_small_model(tmp_path / "base")
    recipe = override(recipe, [f"base.model={folder}"])
    stopped_after(2, recipe)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"base: the weights of {folder}.*--accept base"):
        train(recipe, resume=True, quiet=True)
    train(recipe, resume=True, accept=["base"], quiet=True)


def test_another_compute_dtype_is_named(begun: Recipe, monkeypatch: pytest.MonkeyPatch):
    """compute_dtype=auto is another one on another machine."""
    real = trainer_module.versions
    monkeypatch.setattr(trainer_module, "versions", lambda model: real(model) | {"compute dtype": "float16"})
    monkeypatch.setattr(trainer_module, "base_fingerprint", lambda model: "other")
    monkeypatch.setattr("lora_dpo.training.start.base_fingerprint", lambda model: "other")
    with pytest.raises(RunError, match=r"float16 here, and in float32 then: set base\.compute_dtype=float32"):
        train(begun, resume=True, quiet=True)


def test_other_versions_are_told_and_go_on(
    begun: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = trainer_module.versions
    monkeypatch.setattr(trainer_module, "versions", lambda model: real(model) | {"peft": "9.9"})
    train(begun, resume=True)
    assert "→ 9.9 since the checkpoint: going on, though not bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["dta"], ["loss", "lr"]])
def test_accept_takes_only_what_there_is(begun: Recipe, names: list[str]):
    with pytest.raises(RecipeError, match="--accept got"):
        train(begun, resume=True, accept=names, quiet=True)
    with pytest.raises(RecipeError, match="give --resume with it"):
        train(begun, accept=["data"], quiet=True)


def test_a_run_goes_on_without_its_recipe_yaml(begun: Recipe, tmp_path: Path):
    """The checkpoint holds its own."""
    whole = train(override(begun, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    for content in (None, "base: {model: [", "a: 1\n"):
        run = run_of(begun)
        run.recipe_file.unlink() if content is None else run.recipe_file.write_text(content)
        run = train(begun, resume=True, quiet=True)
        assert load_recipe(run.recipe_file) == begun
        assert adapter_bytes(run) == adapter_bytes(whole)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(recipe: Recipe, tmp_path: Path):
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    def crash(record: Record) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        train(recipe, observers=[crash], quiet=True)
    assert run_of(recipe).checkpoints() == []
    run = train(recipe, resume=True, quiet=True)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert [r["step"] for r in run.records()] == [r["step"] for r in whole.records()]


def test_an_evaluation_that_was_broken_off_is_made_after_resuming(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["training.eval_every=2", "training.best_metric=loss", "training.save_every=3"]
    recipe = override(recipe, words)
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    real = trainer_module.evaluate

    def interrupted(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)

    for _ in range(2):  # and broken off again after resuming
        with monkeypatch.context() as patch, pytest.raises(Stopped, match="step-000002"):
            patch.setattr(trainer_module, "evaluate", interrupted)
            train(recipe, resume=run_of(recipe).recipe_file.exists(), quiet=True)
        told_so_far = [(r["step"], r["kind"]) for r in run_of(recipe).records()]
        assert told_so_far == [(0, "shift"), (1, "step"), (2, "step")]
    run = train(recipe, resume=True, quiet=True)
    assert adapter_bytes(run) == adapter_bytes(whole)

    def told(run: RunDirectory) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in r.items() if "eval" in k or "shift" in k or k in ("step", "kind", "loss")}
            for r in run.records()
        ]

    assert told(run) == told(whole)
    states = [read_state(r.checkpoint_folder(6)) for r in (run, whole)]
    assert (states[0].best, states[0].best_step) == (states[1].best, states[1].best_step)


def test_a_signal_before_the_first_step_loses_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="the same command") as stopped:
        patch.setattr("lora_dpo.training.start.load_tokenizer", interrupted)
        train(recipe, quiet=True)
    assert stopped.value.code == 143
    train(override(recipe, ["training.max_steps=1"]), quiet=True)


def test_a_best_checkpoint_that_was_damaged_since_is_not_taken(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    words = ["training.save_every=1", "training.eval_every=1", "training.best_metric=logps/rejected"]

    def damage_the_best(record: Record) -> None:
        if record.step == 6 and record.kind == "evaluation":
            best = read_state(run.checkpoint_folder(5)).best_step
            (run.checkpoint_folder(best) / "adapter" / "adapter_config.json").write_text("{}")

    run = run_of(recipe)
    train(override(recipe, words), observers=[damage_the_best])
    assert "is damaged (adapter/adapter_config.json is changed)" in capsys.readouterr().out
    last = load_file(run.checkpoint_folder(6) / "adapter" / "adapter_model.safetensors")
    kept = load_file(run.adapter_folder / "adapter_model.safetensors")
    assert all(torch.equal(last[name], kept[name]) for name in last)


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_begins(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2**33, 2**33 - 2**21, 2**20 + 2**17))
    with pytest.raises(RunError, match=r"the run \(4 checkpoints\) takes .* are free"):
        train(override(recipe, ["training.save_every=2"]), quiet=True)
    assert not run_of(recipe).recipe_file.exists()


def test_a_finished_adapter_that_was_damaged_is_refused_and_written_again(recipe: Recipe, tmp_path: Path):
    from lora_dpo.export import export_adapter
    from lora_dpo.finished import open_finished

    recipe = override(recipe, ["training.max_steps=1"])
    run = train(recipe, quiet=True)
    (run.adapter_folder / "notes.txt").write_text("mine")
    open_finished(run.path)
    file = run.adapter_folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is changed.*--resume"):
        open_finished(run.path)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is changed"):
        export_adapter(run, tmp_path / "export")
    train(recipe, resume=True, quiet=True)
    assert file.read_bytes() == content
    assert (export_adapter(run, tmp_path / "export") / file.name).read_bytes() == content


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("adapter.rank=1", r"is \[4, 64\] there, and \[1, 64\] here"),
        ("training.optimizer=adamw_8bit", "put it back"),
    ],
)
def test_what_cannot_go_on_is_refused_though_it_is_accepted(begun: Recipe, word: str, says: str):
    with pytest.raises(RunError, match=says):
        train(override(begun, [word]), resume=True, accept=["adapter", "training"], quiet=True)


def test_a_step_that_is_refused_costs_none_of_those_before_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    import lora_dpo.training.optimizer_steps as module

    genuine = module.what_is_wrong

    def wrong(flags: Any, loss: float, branches: Any) -> str | None:
        calls.append(loss)
        return "row 7 is no number" if len(calls) == 4 else genuine(flags, loss, branches)

    calls: list[float] = []
    monkeypatch.setattr(module, "what_is_wrong", wrong)
    with pytest.raises(RunError, match="step 4: row 7 is no number"):
        train(recipe, quiet=True)
    assert read_state(run_of(recipe).checkpoint_folder(3)).step == 3


def test_a_second_signal_in_the_first_save_says_what_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    def stop(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def again(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="--resume begins again"):
        patch.setattr(trainer_module, "save_checkpoint", again)
        train(recipe, observers=[stop], quiet=True)
    train(recipe, resume=True, quiet=True)


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from accelerate import Accelerator

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the service is away")

    monkeypatch.setattr(Accelerator, "log", away)
    run = train(override(recipe, ["training.trackers=tensorboard", "training.max_steps=3"]))
    assert capsys.readouterr().out.count("the service is away") == 1
    assert [r["step"] for r in run.records()] == [0, 1, 2, 3, 3]
