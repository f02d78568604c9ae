"""A run from recipe to adapter: what it learns, writes, and survives."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from builders import pair_rows
from safetensors.torch import load_file

from lora_dpo.errors import DataError, RecipeError, RunError
from lora_dpo.finished import open_finished
from lora_dpo.recipe import Recipe, Training, load_recipe, override
from lora_dpo.run_directory import RunDirectory, damage
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Record, Stopped, train
from lora_dpo.training.optimizer import learning_rate


def adapter_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_folder / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_writes_everything_it_names(recipe: Recipe):
    seen: list[Record] = []
    run = train(override(recipe, ["training.max_steps=20"]), observers=[seen.append], quiet=True)
    assert [record.step for record in seen if record.kind == "step"] == list(range(1, 21))
    assert [(r.kind, r.step) for r in seen if r.kind != "step"] == [("shift", 0), ("evaluation", 20)]
    assert seen[1].metrics["loss"] == pytest.approx(math.log(2), abs=0.01)
    final = seen[-1]
    assert final.kind == "evaluation"
    assert final.metrics["eval/rewards/accuracy"] == 1.0
    assert final.metrics["eval/loss"] < 0.3
    records = list(run.records())
    assert [r["step"] for r in records] == [record.step for record in seen]
    named = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margin",
        "rewards/accuracy",
        "logps/chosen",
    }
    named |= {"logps/rejected", "logps/chosen_change", "logps/rejected_change", "grad_norm", "learning_rate"}
    named |= {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
    assert named <= records[1].keys()
    assert load_recipe(run.recipe_file) == override(recipe, ["training.max_steps=20"])
    assert damage(run.checkpoint_folder(20)) is None


def test_recipe_yaml_replays_the_run(recipe: Recipe, tmp_path: Path):
    first = train(recipe, quiet=True)
    again = train(load_recipe(first.recipe_file, [f"run_directory={tmp_path / 'again'}"]), quiet=True)
    assert same(adapter_of(first), adapter_of(again))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_a_run_that_dies_between_checkpoints_resumes_to_the_same_adapter_bit_for_bit(
    recipe: Recipe, tmp_path: Path, optimizer: str
):
    recipe = override(
        recipe, [f"training.optimizer={optimizer}", "training.save_every=2", "training.eval_every=3"]
    )
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == 5:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, observers=[crash], quiet=True)
    resumed = train(recipe, resume=True, quiet=True)
    assert same(adapter_of(whole), adapter_of(resumed))
    steps = [r["step"] for r in resumed.records() if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6], "no step is missing or twice"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on(
    recipe: Recipe, tmp_path: Path, number: signal.Signals
):
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    def interrupt(record: Record) -> None:
        if record.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="--resume") as stopped:
        train(recipe, observers=[interrupt], quiet=True)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert same(adapter_of(whole), adapter_of(train(recipe, resume=True, quiet=True)))


def test_a_resumed_run_and_its_evaluation_tokenize_nothing(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORA_DPO_CACHE", str(Path(recipe.run_directory).parent / "cache"))
    tokenized, branches = [], ChatTokenizer.branches
    monkeypatch.setattr(ChatTokenizer, "branches", lambda *given: (tokenized.append(1), branches(*given))[1])
    train(recipe)
    assert len(tokenized) == 40
    assert "tokenized before" not in capsys.readouterr().out
    train(override(recipe, ["data.workers=1"]), resume=True)
    assert "tokens (tokenized before: read from the cache)\n" in capsys.readouterr().out
    open_finished(Path(recipe.run_directory))
    assert len(tokenized) == 40


def test_a_damaged_checkpoint_is_passed_over(recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    recipe = override(recipe, ["training.save_every=2", "training.keep_checkpoints=9"])
    run = train(recipe, quiet=True)
    expected = adapter_of(run)
    file = run.checkpoint_folder(6) / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "optimizer.safetensors" in str(damage(run.checkpoint_folder(6)))
    again = train(recipe, resume=True)
    assert "passed over step-000006" in capsys.readouterr().out
    assert same(adapter_of(again), expected)


def test_a_run_directory_is_not_overwritten_and_not_resumed_with_another_recipe(recipe: Recipe):
    with pytest.raises(RunError, match="no run"):
        train(recipe, resume=True, quiet=True)
    train(recipe, quiet=True)
    with pytest.raises(RunError, match="--resume"):
        train(recipe, quiet=True)
    with pytest.raises(RunError, match=r"loss\.beta: 0\.1 → 0\.2"):
        train(override(recipe, ["loss.beta=0.2"]), resume=True, quiet=True)
    rows = Path(str(recipe.data.train))
    rows.write_text(rows.read_text().replace("the cat", "the bat"))
    with pytest.raises(RunError, match="data are not those"):
        train(recipe, resume=True, quiet=True)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_quietly_started_over(recipe: Recipe):
    run = train(recipe, quiet=True)
    for folder in run.checkpoints():
        (folder / "state.json").write_text("{}")
    before = run.metrics_file.read_text()
    with pytest.raises(RunError, match="no checkpoint"):
        train(recipe, resume=True, quiet=True)
    assert run.metrics_file.read_text() == before


def test_a_second_process_is_kept_out_and_what_a_dead_one_left_is_swept_away(recipe: Recipe):
    run = RunDirectory.create(recipe.run_directory)
    left = run.checkpoints_folder / ".step-000003.part"
    left.mkdir()
    with run.locked(), pytest.raises(RunError, match="another process"):
        train(recipe, quiet=True)
    train(override(recipe, ["training.max_steps=1"]), quiet=True)
    assert not left.exists()


def test_a_run_means_the_same_from_another_folder_and_after_its_template_was_edited(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from builders import CHATML

    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text(CHATML)
    words = ["data.train=pairs.jsonl", "data.chat_template=mine.jinja", "training.max_steps=1"]
    run = train(override(recipe, words), quiet=True)
    Path("mine.jinja").write_text("edited")
    monkeypatch.chdir("/")
    recorded = load_recipe(run.recipe_file)
    assert recorded.data.train == str(tmp_path / "pairs.jsonl")
    assert recorded.data.chat_template == CHATML
    assert open_finished(run.path).data.tokenizer.chat_template == CHATML


def test_a_row_that_the_template_refuses_is_named_or_skipped(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    refusing = "{% if messages[0].content.endswith(' 3') %}{{ raise_exception('no threes') }}{% endif %}"
    from builders import CHATML

    recipe = override(recipe, [f"data.chat_template={refusing + CHATML}", "training.max_steps=1"])
    with pytest.raises(DataError, match=r"row 4: .*on_bad_row=skip"):
        train(recipe, quiet=True)
    train(override(recipe, ["data.on_bad_row=skip"]))
    assert "1 dropped: the chat template refuses the conversation" in capsys.readouterr().out


def test_a_side_longer_than_the_models_positions_is_refused_with_its_row(recipe: Recipe, tmp_path: Path):
    rows = pair_rows(20)
    rows[6]["chosen"] = "cat " * 1500
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={tmp_path / 'long.jsonl'}", "data.eval_last=0", "data.max_tokens=4096"]
    with pytest.raises(RecipeError, match=r"data\.max_tokens.*row 7.*at most 1024"):
        train(override(recipe, words), quiet=True)


def test_a_run_that_failed_before_its_first_step_can_simply_be_started_again(recipe: Recipe):
    with pytest.raises(DataError):
        train(override(recipe, ["data.train=/nowhere/pairs.jsonl"]), quiet=True)
    train(override(recipe, ["training.max_steps=1"]), quiet=True)


def test_the_best_adapter_is_kept_and_training_stops_early(recipe: Recipe):
    words = ["training.eval_every=1", "training.best_metric=loss", "training.early_stopping=2"]
    # At this rate the loss falls, then the run falls apart: the best step lies in the middle.
    run = train(
        override(
            recipe, [*words, "training.learning_rate=0.3", "training.max_steps=30", "training.warmup=0.2"]
        ),
        quiet=True,
    )
    evaluations = {r["step"]: r["eval/loss"] for r in run.records() if r["kind"] == "evaluation"}
    best = min(evaluations, key=evaluations.__getitem__)
    assert max(evaluations) == best + 2 < 30
    kept = load_file(run.checkpoint_folder(best) / "adapter" / "adapter_model.safetensors")
    assert same(adapter_of(run), kept)


def test_old_checkpoints_are_deleted_but_not_the_best(recipe: Recipe):
    words = ["training.save_every=1", "training.keep_checkpoints=1", "training.eval_every=1"]
    # Rejected responses become less likely from the first step on, so by this metric that one is the best.
    words += ["training.best_metric=logps/rejected"]
    run = train(override(recipe, words), quiet=True)
    values = {r["step"]: r["eval/logps/rejected"] for r in run.records() if r["kind"] == "evaluation"}
    best = max(values, key=values.__getitem__)
    assert [folder.name for folder in run.checkpoints()] == [f"step-{n:06d}" for n in sorted({best, 6})]
    assert best < 6, "the best is among those that the count alone would delete"


def test_sft_trains_on_the_preferred_responses(recipe: Recipe):
    seen: list[Record] = []
    train(override(recipe, ["loss=SFT", "training.max_steps=15"]), observers=[seen.append], quiet=True)
    losses = [record.metrics["loss"] for record in seen if record.kind == "step"]
    assert losses[-1] < losses[0] - 0.4


def test_float16_trains_with_loss_scaling_and_float32_adapters(recipe: Recipe):
    recipe = override(
        recipe, ["base.compute_dtype=float16", "training.max_steps=15", "training.save_every=5"]
    )
    seen: list[Record] = []
    run = train(recipe, observers=[seen.append], quiet=True)
    state = json.loads((run.checkpoint_folder(15) / "state.json").read_text())
    assert state["loss_scale"] > 0
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(run).values())
    assert seen[-1].metrics["eval/rewards/accuracy"] > 0.8


def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_update(recipe: Recipe):
    from lora_dpo.training import start as module

    def poison(record: Record) -> None:
        if record.step == 2:
            assert alive
            next(iter(alive[0].model.trainable.values())).data.fill_(float("nan"))

    alive: list[module.Trainer] = []

    class Watched(module.Trainer):
        def run(self) -> None:
            alive.append(self)
            super().run()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="step 3"):
        patch.setattr(module, "Trainer", Watched)
        train(recipe, observers=[poison], quiet=True)


def test_trackers_by_name(recipe: Recipe):
    with pytest.raises(RecipeError, match=r"training\.trackers got 'tensorbored'"):
        train(override(recipe, ["training.trackers=tensorbored"]), quiet=True)


def test_a_tracker_gets_every_step_and_the_recipe(recipe: Recipe):
    run = train(override(recipe, ["training.trackers=tensorboard", "training.max_steps=2"]), quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "lora_dpo"))
    events.Reload()
    assert [event.step for event in events.Scalars("rewards/margin")] == [1, 2]
    assert events.Scalars("eval/loss")[0].step == 2


def test_a_metric_that_no_evaluation_gives_is_refused_before_anything_is_loaded(recipe: Recipe):
    words = ["base.model=/nowhere", "training.eval_every=1", "training.best_metric=rewards/acuracy"]
    with pytest.raises(RecipeError, match="rewards/accuracy"):
        train(override(recipe, words), quiet=True)


def test_the_users_accelerate_settings_do_not_change_the_gradient(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    norms = []
    for name, value in (("plain", "1"), ("divided", "4")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        run = train(
            override(recipe, [f"run_directory={tmp_path / name}", "training.max_steps=1"]), quiet=True
        )
        norms += [record["grad_norm"] for record in run.records() if record["kind"] == "step"]
    assert norms[0] == norms[1] > 0


def test_evaluating_on_nothing_is_refused(recipe: Recipe):
    with pytest.raises(RecipeError, match="held-out rows"):
        train(override(recipe, ["data.eval_last=0", "training.eval_every=2"]), quiet=True)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_then_follows_its_schedule(
    schedule: str, rates: list[float]
):
    training = Training(learning_rate=1.0, schedule=schedule, warmup=0.3)  # pyright: ignore
    assert [learning_rate(training, step, 6) for step in range(6)] == pytest.approx(rates)


def test_two_processes_compute_the_step_of_one(recipe: Recipe, tmp_path: Path):
    """The gradients are added up over processes; without dropout only rounding differs."""
    import subprocess
    import sys

    recipe = override(recipe, ["adapter.dropout=0", "base.device=cpu", "training.max_steps=2"])
    one = train(recipe, quiet=True)
    from lora_dpo.recipe import to_yaml

    (tmp_path / "two.yaml").write_text(to_yaml(override(recipe, [f"run_directory={tmp_path / 'two'}"])))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "lora_dpo.cli"]
    done = subprocess.run(
        [*launch, "train", str(tmp_path / "two.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "over 2 processes" in done.stdout
    two = RunDirectory(tmp_path / "two")
    losses, norms = (
        [[r[name] for r in run.records() if r["kind"] == "step"] for run in (one, two)]
        for name in ("loss", "grad_norm")
    )
    assert len(losses[1]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    # Adam's first updates have the gradient's sign alone, so a rounding near zero moves a weight by the rate.
    first, second = adapter_of(one), adapter_of(two)
    assert all((first[n] - second[n]).norm() < 0.02 * first[n].norm() for n in first)
