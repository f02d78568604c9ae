"""Every objective trains from a recipe, and what it keeps from step to step survives a crash."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo.finished import evaluate_run, open_finished
from lora_dpo.losses import BCO, DPO, IPO, OBJECTIVES, TDPO, WPO, BetaDPO, ChosenSFT, Objective, Sum
from lora_dpo.recipe import Recipe, load_recipe, override, to_yaml
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import Record, train

STATEFUL: dict[str, Objective] = {
    "BCO": BCO(),
    "BetaDPO": BetaDPO(),
    "a sum": Sum((BetaDPO(), WPO(of=BCO(beta=0.5)), TDPO(), ChosenSFT()), (1.0, 0.5, 0.5, 0.1)),
}


def with_loss(recipe: Recipe, loss: Objective, *overrides: str) -> Recipe:
    from dataclasses import replace

    return override(replace(recipe, loss=loss), overrides)


def adapter_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_evaluates_and_is_replayed_from_its_record(name: str, recipe: Recipe):
    recipe = with_loss(
        recipe,
        OBJECTIVES[name](),
        "training.max_steps=2",
        "adapter.dropout=0",
        "training.tokens_per_microbatch=150",
    )
    run = train(recipe, quiet=True)
    first, second = [r for r in run.records() if r["kind"] == "step"]
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0
    assert first["loss"] != second["loss"]
    evaluation = evaluate_run(open_finished(run.path))
    assert math.isfinite(evaluation.metrics["loss"].mean)
    assert type(load_recipe(run.recipe_file).loss) is OBJECTIVES[name]


@pytest.mark.parametrize("name", STATEFUL)
def test_what_an_objective_keeps_survives_a_crash(name: str, recipe: Recipe, tmp_path: Path):
    recipe = with_loss(recipe, STATEFUL[name], "training.save_every=2")
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == 5:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, observers=[crash], quiet=True)
    resumed = train(recipe, resume=True, quiet=True)
    a, b = adapter_of(whole), adapter_of(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [r["loss"] for r in whole.records() if r["kind"] == "step"] == [
        r["loss"] for r in resumed.records() if r["kind"] == "step"
    ]


def test_a_whole_step_over_two_processes_is_that_of_one(recipe: Recipe, tmp_path: Path):
    recipe = with_loss(
        recipe,
        Sum((OBJECTIVES["AOT"](), BCO(), IPO(), DPO()), (1.0, 1.0, 1.0, 1.0)),
        *("adapter.dropout=0", "base.device=cpu", "training.max_steps=2"),
    )
    one = train(recipe, quiet=True)
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
    two = RunDirectory(tmp_path / "two")
    for name in ("loss", "grad_norm", "rewards/shift", "rewards/margin"):
        first, second = ([r[name] for r in run.records() if r["kind"] == "step"] for run in (one, two))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), name
