"""The offline recipe of rounds, from nothing: base, labels, reward model, loop; and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_dpo.errors import RunError
from lora_dpo.quickstart import BaseSettings, cache_folder, iterating
from lora_dpo.recipe import IterativeRecipe, Recipe, load_recipe, override
from lora_dpo.training import Display

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "iterative_dpo.py"


def few_of_one_letter(prompt, response):
    """A rule that a model which knows nothing can please."""
    return float(len(set(response)))


def changed(recipe: Recipe, words: list[str]) -> IterativeRecipe:
    made = override(recipe, words)
    assert isinstance(made, IterativeRecipe)
    return made


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[IterativeRecipe, BaseSettings]:
    """A hundredth of the work, so that it ends in seconds; its model knows nothing."""
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(iterating, "rule_reward", few_of_one_letter)
    settings = BaseSettings(
        demonstrations=64, width=64, layers=1, heads=1, mlp=64, preferences=24, held_out=8
    )
    folder = cache_folder(settings)
    words = [f"base.model={folder / 'base'}", f"data.train={folder / 'train.jsonl'}"]
    words += [f"data.eval={folder / 'eval.jsonl'}", f"run_directory={tmp_path / 'loop'}"]
    words += [f"judge.of=reward:{tmp_path / 'reward'}", "pairing.keep_unfinished=true"]
    words += ["rounds.count=2", "rounds.prompts=12", "rounds.patience=0", "sampling.max_new_tokens=8"]
    return changed(load_recipe(RECIPE), words), settings


def test_the_offline_recipe_goes_the_whole_way_and_keeps_what_it_made(
    small: tuple[IterativeRecipe, BaseSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe, settings = small
    loop = iterating.iterate(recipe, settings=settings)
    told = [json.loads(line) for line in loop.rounds_file.read_text().splitlines()]
    assert [line["round"] for line in told] == [0, 1, 2]
    assert all({"reward", "held_out_judge", "kl", "guard"} <= line.keys() for line in told)
    head = tmp_path / "reward" / "adapter" / "adapter_model.safetensors"
    made = head.stat().st_mtime_ns
    with pytest.raises(RunError, match=r"rounds\.count"):
        iterating.iterate(changed(recipe, ["rounds.count=3"]), resume=True, settings=settings)
    again = iterating.iterate(changed(recipe, ["rounds.count=1"]), settings=settings)
    assert again.path == tmp_path / "loop-2", "without --resume a second loop gets a folder of its own"
    assert head.stat().st_mtime_ns == made, "the reward model is used again"
    for name in ("samples.jsonl", "judged.jsonl", "pairs.jsonl"):
        assert (
            getattr(again.round(1), name.removesuffix(".jsonl")).read_bytes()
            == (loop.path / "round-1" / name).read_bytes()
        )
    assert "3. rounds" in capsys.readouterr().out


def test_the_labels_are_the_base_s_own_responses_best_first(
    small: tuple[IterativeRecipe, BaseSettings], capsys: pytest.CaptureFixture[str]
):
    recipe, settings = small
    iterating.iterate(changed(recipe, ["rounds.count=1"]), settings=settings)
    assert f"labelled pairs, not {iterating.LABELS}" in capsys.readouterr().out
    (file,) = (cache_folder(settings) / "labels-0").glob("*/labels.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows
    # What labels and reward model were made of is another now: neither is used for it.
    reward = Path(recipe.judge.what)
    for word in ("sampling.max_new_tokens=4", "training.seed=1"):
        other = changed(recipe, [word])
        labels = iterating.rule_labels(other, file.parents[1], Display(quiet=True))
        assert labels != file and labels.read_bytes() != file.read_bytes()
        with pytest.raises(RunError, match=r"data\.train.*judge\.of=reward:FOLDER"):
            iterating.train_reward_model(other, labels, reward, Display(quiet=True))
    assert iterating.rule_labels(recipe, file.parents[1], Display(quiet=True)) == file
    for row in rows:
        assert row["score_chosen"] == few_of_one_letter(None, text(row["chosen"]))
        assert row["score_rejected"] == few_of_one_letter(None, text(row["rejected"]))
        assert row["score_chosen"] > row["score_rejected"]


def text(side: str | list[dict[str, str]]) -> str:
    return side if isinstance(side, str) else side[-1]["content"]
