"""Numbers that are none stop a run or are left out, and a run that goes wrong is told of in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import float64_model, llama_config, pair_rows, random_branches

from lora_dpo.batching import StepSampler
from lora_dpo.errors import RunError
from lora_dpo.evaluation import evaluate
from lora_dpo.losses import BCO, DPO, LogProbs, Loss, Objective, preference_metrics
from lora_dpo.recipe import Recipe, override
from lora_dpo.training import Record, optimizer_steps, step_gradient, train
from lora_dpo.training.checkpoint import read_state
from lora_dpo.training.finite import (
    check_finite_adapter,
    step_flags,
    what_is_wrong,
    with_bad_gradient,
    wrong_gradient,
)
from lora_dpo.training.step import BAD_LOSS, BAD_POLICY, BAD_REFERENCE
from lora_dpo.training.watch import STILL, TREND, Watch

STEP, START = import_module("lora_dpo.training.step"), import_module("lora_dpo.training.start")


def examples(count: int = 6) -> list[Any]:
    rng = np.random.default_rng(5)
    return [random_branches(rng, 9, (8 + n, 12 - n), row=n + 1) for n in range(count)]


class Poison:
    """Makes one row's log-probs, or the gradient by them, not a number; in every step or the n-th only."""

    def __init__(self, key: bytes | None, *, what: str = "policy", only: int | None = None):
        self.genuine, self.key, self.what, self.only = STEP.batch_logprobs, key, what, only

    def __call__(self, model: Any, objective: Any, batch: Any, *given: Any, **named: Any) -> Any:
        made = self.genuine(model, objective, batch, *given, **named)
        bad = torch.tensor([self.key in (None, key) for key in batch.keys])[:, None]
        if self.what == "gradient":
            if made.policy.requires_grad:
                made.policy.register_hook(lambda slope: slope.masked_fill(bad, math.nan))
            return made
        if getattr(made, self.what) is None:  # the second pass of a whole step
            return made
        return replace(made, **{self.what: getattr(made, self.what).masked_fill(bad, math.nan)})


def poisoned(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **what: Any) -> tuple[Any, list[Any]]:
    """(a row of the first step, the trainers to come); that row's numbers are none."""
    trainers: list[Any] = []

    class Watched(START.Trainer):
        def run(self) -> None:
            trainers.append(self)
            self.row = self.data.train[self.sampler.step(2)[0]]
            monkeypatch.setattr(STEP, "batch_logprobs", Poison(self.row.key, **what))
            super().run()

    monkeypatch.setattr(START, "Trainer", Watched)
    return Watched, trainers


@pytest.mark.parametrize("what", ["policy", "reference", "gradient"])
def test_a_number_that_is_none_stops_the_run_and_names_its_row(
    what: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    _, trainers = poisoned(recipe, monkeypatch, what=what)
    with pytest.raises(RunError) as stopped:
        train(override(recipe, ["training.save_every=1"]), quiet=True)
    text, trainer = str(stopped.value), trainers[0]
    assert f"{trainer.row.where}" in text and what in text
    assert "learning_rate" in text and "on_bad_step=skip" in text
    number = trainer.state.step + 1
    assert text.startswith(f"step {number}:")
    kept = [int(folder.name[-6:]) for folder in trainer.run_directory.checkpoints()]
    assert kept == list(range(max(1, number - 2), number)), "what was saved before is still there"
    check_finite_adapter(trainer.model)
    assert all(p.grad is None for p in trainer.model.trainable.values())


def test_a_step_that_is_left_out_changes_nothing_and_is_counted(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """BCO keeps a number from step to step; what it was stays."""
    _, trainers = poisoned(recipe, monkeypatch)
    kept: list[Any] = []

    def watch(record: Record) -> None:
        if record.kind != "step":
            return
        trainer = trainers[0]
        adapter = torch.cat([p.detach().flatten() for p in trainer.model.trainable.values()])
        moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
        kept.append((adapter, torch.cat([m.flatten() for m in moments]), dict(trainer.state.objective)))

    words = ["training.on_bad_step=skip", "training.save_every=1", "training.keep_checkpoints=9"]
    words += ["data.eval_last=0", "reference.kind=base"]
    run = train(override(replace(recipe, loss=BCO()), words), observers=[watch])
    steps = [record for record in run.records() if record["kind"] == "step"]
    counts = [r["skipped_steps"] for r in steps]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    bad = [n for n in range(6) if counts[n] > (counts[n - 1] if n else 0)]
    assert 0 < len(bad) < 6 and 0 not in bad
    for n in range(1, 6):
        same = [torch.equal(kept[n][i], kept[n - 1][i]) for i in (0, 1)]
        assert same == [n in bad] * 2
        assert (kept[n][2] == kept[n - 1][2]) == (n in bad)
        assert ("loss" not in steps[n]) == (n in bad)
        assert read_state(run.checkpoint_folder(n + 1)).skipped_steps == counts[n]
    said = capsys.readouterr().out
    assert said.count("is left out") == len(bad)
    assert str(trainers[0].row.where) in said


def test_a_run_whose_every_step_is_bad_stops_though_such_steps_are_left_out(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(optimizer_steps, "SKIPS", 3)

    class Broken(START.Trainer):
        def run(self) -> None:
            monkeypatch.setattr(STEP, "batch_logprobs", Poison(None))
            super().run()

    monkeypatch.setattr(START, "Trainer", Broken)
    with pytest.raises(RunError, match=r"^step 4: .*and 3 more, after 3 such steps in a row"):
        train(override(recipe, ["training.on_bad_step=skip"]), quiet=True)


def test_the_count_of_steps_left_out_survives_a_crash(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    poisoned(recipe, monkeypatch)
    recipe = override(recipe, ["training.on_bad_step=skip", "training.save_every=1"])

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.metrics.get("skipped_steps"):
            raise Crash

    with pytest.raises(Crash):
        train(recipe, observers=[crash], quiet=True)
    resumed = [r for r in train(recipe, resume=True, quiet=True).records() if r["kind"] == "step"]
    assert [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    counts = [r["skipped_steps"] for r in resumed]
    assert counts == sorted(counts) and counts[-1] >= 1


@pytest.mark.parametrize("objective", [DPO(), BCO()], ids=["by micro-batch", "whole step"])
def test_every_example_of_a_step_has_its_own_flag(objective: Any, monkeypatch: pytest.MonkeyPatch):
    model, items = float64_model(llama_config()), examples()
    for what, flag in (("policy", BAD_POLICY), ("reference", BAD_REFERENCE)):
        with monkeypatch.context() as patch:
            patch.setattr(STEP, "batch_logprobs", Poison(items[4].key, what=what))
            sums = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=0)
        flags = [int(n) & (BAD_POLICY | BAD_REFERENCE) for n in sums.flags.tolist()]
        assert flags == [0, 0, 0, 0, flag, 0]
        text = what_is_wrong(sums.flags.tolist(), math.nan, items)
        assert text is not None and text.startswith(f"the {what}'s") and text.endswith("random row 5")
    fine = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=0)
    assert not fine.flags.any() and what_is_wrong(fine.flags.tolist(), 1.0, items) is None


def test_processes_know_each_others_flags():
    own = [torch.tensor([0.0, float(BAD_LOSS), 0.0]), torch.tensor([float(BAD_POLICY), 0.0])]
    together = sum(step_flags(flags, p, 2, 5) for p, flags in enumerate(own))
    assert isinstance(together, torch.Tensor)
    assert together.tolist() == [0, BAD_POLICY, BAD_LOSS, 0, 0]
    many = examples(9)
    assert "random row 1, random row 2" in str(what_is_wrong([BAD_LOSS] * 9, math.nan, many))
    assert str(what_is_wrong([BAD_LOSS] * 9, math.nan, many)).endswith("and 4 more")


@pytest.mark.parametrize("objective", [DPO(), BCO()], ids=["by micro-batch", "whole step"])
def test_rows_whose_own_gradient_is_none_are_found(objective: Any, monkeypatch: pytest.MonkeyPatch):
    model, items = float64_model(llama_config()), examples()
    monkeypatch.setattr(STEP, "batch_logprobs", Poison(items[2].key, what="gradient"))
    sums = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=0)
    assert not sums.flags.any() and math.isfinite(sums.loss.item())
    assert with_bad_gradient(sums.step, 60) == [2]
    assert all(p.grad is None for p in model.trainable.values())
    monkeypatch.undo()
    assert with_bad_gradient(sums.step, 60) == []
    assert "no single row" in wrong_gradient([], len(items))


def test_an_adapter_that_is_none_is_not_saved():
    model = float64_model(llama_config())
    check_finite_adapter(model)
    name, parameter = next(iter(model.trainable.items()))
    parameter.data[0, 0] = math.inf
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        check_finite_adapter(model)


def test_an_update_that_breaks_the_adapter_is_not_saved(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    trainers: list[Any] = []

    class Breaks(START.Trainer):
        def step(self) -> dict[str, float]:
            metrics = super().step()
            next(iter(self.model.trainable.values())).data.fill_(math.nan)
            trainers.append(self)
            return metrics

    monkeypatch.setattr(START, "Trainer", Breaks)
    with pytest.raises(RunError, match=r"not finite in .*not saved"):
        train(override(recipe, ["training.max_steps=1"]), quiet=True)
    run = trainers[0].run_directory
    assert not run.checkpoints() and not run.adapter_folder.exists()


def test_an_evaluation_that_is_no_number_is_said_and_never_the_best(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module, genuine = import_module("lora_dpo.evaluation"), evaluate
    rows: list[Any] = []

    class Watched(START.Trainer):
        def _evaluate(self) -> dict[str, float]:
            rows.append(self.data.eval[3])
            key = rows[0].key if self.state.step == 2 else b""
            with monkeypatch.context() as patch:
                patch.setattr(module, "batch_logprobs", Poison(key))
                return super()._evaluate()

    assert genuine is module.evaluate
    monkeypatch.setattr(START, "Trainer", Watched)
    words = ["training.eval_every=1", "training.best_metric=logps/chosen", "training.max_steps=3"]
    run = train(override(recipe, words))
    said = capsys.readouterr().out
    assert f"not finite for {rows[0].where}" in said and "loss" in said
    evaluations = {r["step"]: r for r in run.records() if r["kind"] == "evaluation"}
    assert "eval/loss" not in evaluations[2] and "eval/loss" in evaluations[3]
    assert read_state(run.checkpoint_folder(3)).best_step in (1, 3)


# ---- the watch

Step = Callable[[int, np.random.Generator], Mapping[str, float]]


def told(steps: int, step: Step, seed: int = 0, watch: Watch | None = None) -> dict[int, list[str]]:
    """The lines of a synthetic run by step; now and then it goes on from its state, as JSON."""
    rng, lines, watch = np.random.default_rng(seed), {}, watch or Watch()
    for n in range(steps):
        said = watch.step(step(n, rng))
        if said:
            lines[n] = said
        if n % 13 == 0:
            state = json.dumps(watch.state())
            assert len(state) < 15_000
            watch = Watch()
            watch.restore(json.loads(state))
    return lines


def ordinary_dpo(n: int, rng: np.random.Generator) -> dict[str, float]:
    """DPO as it mostly goes: accuracy to 0.75, both log-probs a little down, norms log-normal."""
    done = 1 - math.exp(-n / 300)
    return {
        "loss": math.log(2) - 0.2 * done + rng.normal(0, 0.06),
        "grad_norm": (1 + 2 * done) * math.exp(rng.normal(0, 0.4)),
        "rewards/accuracy": min(1.0, 0.5 + 0.25 * done + rng.normal(0, 0.1)),
        "logps/chosen": -300 + rng.normal(0, 40),
        "logps/chosen_change": -15 * done + rng.normal(0, 4),
        "logps/rejected_change": -40 * done + rng.normal(0, 6),
    }


def ordinary_sft(n: int, rng: np.random.Generator) -> dict[str, float]:
    """One row a step: the loss jumps about."""
    return {
        "loss": 0.4 + 1.6 * math.exp(-n / 200) + rng.gamma(4, 0.2),
        "grad_norm": math.exp(rng.normal(0, 0.5)),
    }


def ordinary_kto(n: int, rng: np.random.Generator) -> dict[str, float]:
    return {
        "loss": 0.5 - 0.15 * (1 - math.exp(-n / 200)) + rng.normal(0, 0.03),
        "grad_norm": rng.gamma(9, 0.1),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("run", [ordinary_dpo, ordinary_sft, ordinary_kto])
def test_an_ordinary_run_is_left_in_peace(run: Step, seed: int):
    assert told(1500, run, seed) == {}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_jump_is_said_once(name: str):
    def step(n: int, rng: np.random.Generator) -> Mapping[str, float]:
        now = ordinary_dpo(n, rng)
        return {**now, name: 200.0 * now[name]} if n in (100, 103, 500) else now

    lines = told(600, step)
    assert list(lines) == [100, 500], "again only after a while"
    assert all("jumped" in text and "learning_rate" in text for said in lines.values() for text in said)


def test_a_loss_that_grows_past_where_it_began_is_said_once():
    lines = told(400, lambda n, rng: {"loss": 0.7 * math.exp(n / 100) + rng.normal(0, 0.02)})
    assert [text for said in lines.values() for text in said if "worse" in text]
    assert sum(len(said) for said in lines.values()) == 1


def test_a_run_that_has_learned_all_there_is_is_told_so_and_again_only_after_it_was_over():
    def step(n: int, rng: np.random.Generator) -> Mapping[str, float]:
        margin = 12.0 if 100 <= n < 200 or n >= 300 else min(0.02 * n, 1.0)
        loss = math.log1p(math.exp(-margin)) * rng.uniform(0.9, 1.1)
        return {"loss": loss, "grad_norm": 3 * loss, "rewards/accuracy": 1.0 if margin > 1 else 0.7}

    lines = told(400, step)
    assert [100 < n < 130 or 300 < n < 330 for n in lines] == [True, True]
    assert all("no more to learn" in text for said in lines.values() for text in said)


def test_a_dead_run_is_said_for_each_of_its_signs():
    still = told(80, lambda n, rng: {"loss": math.log(2), "grad_norm": rng.uniform(1, 2)})
    silent = told(80, lambda n, rng: {"loss": rng.uniform(1, 2), "grad_norm": 0.0})
    for lines in (still, silent):
        assert list(lines) == [STILL - 1]
        assert "does not move" in lines[STILL - 1][0]
    overflowing = told(80, lambda n, rng: {"loss": rng.uniform(1, 2), "grad_norm": float(n >= 20)})
    assert overflowing == {}, "loss scaling finds its scale"


def test_both_log_probs_falling_is_said_and_again_when_it_is_twice_as_deep():
    def step(n: int, rng: np.random.Generator) -> Mapping[str, float]:
        return ordinary_dpo(n, rng) | {
            "logps/chosen_change": -0.4 * n + rng.normal(0, 3),
            "logps/rejected_change": -0.8 * n + rng.normal(0, 3),
            "logps/chosen": -300 - 0.4 * n,
        }

    lines = told(800, step)
    assert 3 <= len(lines) <= 4 and min(lines) >= 2 * TREND
    assert all("DPOP" in text and "both still fall" in text for said in lines.values() for text in said)

    def level(n: int, rng: np.random.Generator) -> Mapping[str, float]:
        return ordinary_dpo(n, rng) | {"logps/chosen_change": 5.0, "logps/rejected_change": -0.8 * n}

    assert told(800, level) == {}, "rejected ones are meant to fall"


def watched_run(recipe: Recipe, *words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    always = ["data.eval_last=0", "training.schedule=constant", "training.warmup=0", "adapter.dropout=0"]
    always += ["training.gradient_checkpointing=none", "training.tokens_per_microbatch=4000"]
    train(override(recipe, [*always, *words]))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("watch:")]


def test_a_row_that_weighs_too_much_makes_a_jump_in_a_real_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows: list[dict[str, Any]] = [{**row, "weight": 1.0} for row in pair_rows(200)]
    rows[StepSampler(200, 8, 0).step(20)[3]]["weight"] = 1000.0
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={tmp_path / 'weighted.jsonl'}", "training.learning_rate=1e-4"]
    lines = watched_run(recipe, *words, "training.max_steps=22", capsys=capsys)
    assert {line.split(" jumped")[0] for line in lines} == {"watch: the loss", "watch: the gradient's norm"}


def test_a_learning_rate_far_too_high_is_told_of_in_a_real_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    words = ["training.learning_rate=0.5", "training.max_steps=40"]
    lines = watched_run(recipe, *words, capsys=capsys)
    assert len(lines) == 1 and "lower training.learning_rate" in lines[0]


def test_an_adapter_that_does_not_move_is_told_of_in_a_real_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    words = ["training.learning_rate=1e-30", "training.max_steps=28"]
    lines = watched_run(recipe, *words, capsys=capsys)
    assert len(lines) == 1 and "the loss is 0.693147, always the same, since 25 steps" in lines[0]


def test_a_run_that_has_learned_its_rows_is_told_so(recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    words = ["training.learning_rate=0.01", "training.max_steps=30", "loss.beta=1"]
    lines = watched_run(recipe, *words, capsys=capsys)
    assert len(lines) == 1 and "no more to learn" in lines[0]


@dataclass(frozen=True)
class Sinking(Objective):
    """Both sides less and less likely."""

    beta: float = 0.1

    def __call__(self, logprobs: LogProbs) -> Loss:
        rewards = self.beta * logprobs.log_ratio
        return Loss(5 * rewards[:, 0] + rewards[:, 1], preference_metrics(rewards, logprobs))


def test_both_sides_that_sink_are_told_of_in_a_real_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A random model's log-probs have not far to fall: 10 nats are too many to ask of five tokens."""
    monkeypatch.setattr(import_module("lora_dpo.training.watch"), "SHIFT_NATS", 2.0)
    words = ["training.learning_rate=0.001", f"training.max_steps={2 * TREND + 4}"]
    lines = watched_run(replace(recipe, loss=Sinking()), *words, capsys=capsys)
    assert any("both still fall" in line for line in lines)


def test_a_real_run_that_goes_well_is_left_in_peace(recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    words = ["training.learning_rate=0.001", "training.max_steps=40"]
    assert watched_run(recipe, *words, capsys=capsys) == []
