"""Rounds: one base in memory, every stage once, the same result however often it was killed."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nursery import Nursery
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_dpo.errors import DataError, RecipeError, RunError, UserError
from lora_dpo.model import as_base, as_policy, generating, load_adapter, load_model
from lora_dpo.preferences import Prompt, Where
from lora_dpo.recipe import (
    Adapter,
    Data,
    IterativeRecipe,
    Judge,
    Pairing,
    Recipe,
    Reference,
    Rounds,
    Sampling,
    Training,
    from_dict,
    load_recipe,
    override,
    to_dict,
    to_yaml,
)
from lora_dpo.reward import RewardModel, train_reward
from lora_dpo.rounds import LoopDirectory, run_rounds, stages
from lora_dpo.rounds.policies import recipe_of_round
from lora_dpo.rounds.prompts import prepare_prompts, prompts_of_round
from lora_dpo.rounds.telling import verdict
from lora_dpo.sampling import prompt_key
from lora_dpo.training import Display, chat_tokenizer, train

JUDGE = '''
def few_of_one_letter(prompt, response):
    """More different letters, and shorter, is better."""
    return len(set(response)) - 0.05 * len(response)


def short(prompt, response):
    return -float(len(response))
'''


@pytest.fixture
def loop_recipe(recipe: Recipe, tmp_path: Path) -> IterativeRecipe:
    """Two rounds of 6 prompts, 4 responses each, on the tests' small model."""
    (tmp_path / "rule.py").write_text(JUDGE)
    return IterativeRecipe(
        base=recipe.base,
        data=dataclasses.replace(recipe.data, max_rows=20, max_eval_rows=4),
        adapter=Adapter(rank=4),
        training=Training(
            pairs_per_step=4, learning_rate=1e-2, epochs=1, save_every=1, tokens_per_microbatch=400
        ),
        judge=Judge(of=f"function:{tmp_path / 'rule.py'}:few_of_one_letter"),
        sampling=Sampling(responses=4, max_new_tokens=8),
        pairing=Pairing(keep_unfinished=True),  # a random model hardly ever ends
        rounds=Rounds(
            count=2,
            prompts=6,
            held_out_prompts=3,
            held_out_judge=f"function:{tmp_path / 'rule.py'}:short",
            patience=0,
        ),
        run_directory=str(tmp_path / "loop"),
    )


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Where loops are begun as the command line would, without a second's imports each."""
    with Nursery() as found:
        yield found


def results(directory: LoopDirectory) -> dict[str, bytes]:
    """What a loop made, but for times and what names its folder."""
    kept = ("samples.jsonl", "judged.jsonl", "pairs.jsonl", "measures.json", "adapter_model.safetensors")
    files = [file for file in sorted(directory.path.rglob("*")) if file.name in kept]
    files = [file for file in files if "checkpoints" not in file.parts]
    return {str(file.relative_to(directory.path)): file.read_bytes() for file in files}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_loop_leaves_every_stage_on_disk_and_a_line_for_each_policy(loop_recipe: IterativeRecipe):
    loop = run_rounds(loop_recipe, quiet=True)
    told = lines(loop.rounds_file)
    assert [line["round"] for line in told] == [0, 1, 2]
    assert told[0]["kl"]["mean"] == 0 and told[1]["kl"]["mean"] != 0
    assert {"reward", "held_out_judge", "guard"} <= told[2].keys()
    for number in (1, 2):
        here = loop.round(number)
        samples, judged, pairs = lines(here.samples), lines(here.judged), lines(here.pairs)
        assert len(samples) == len(judged) == 6
        assert all(len(line["responses"]) == 4 for line in samples)
        assert all("score" in response for line in judged for response in line["responses"])
        assert told[number]["pairs"] == len(pairs) > 0
        assert all(
            line["score_chosen"] > line["score_rejected"] and line["round"] == number for line in pairs
        )
        assert (here.run.adapter_folder / "adapter_model.safetensors").is_file()
        assert set(told[number]["seconds"]) == {"sample", "judge", "pair", "train", "measure"}
    assert loop.round(1).samples.read_text() != loop.round(2).samples.read_text()


def test_each_round_samples_from_the_policy_of_the_round_before(loop_recipe: IterativeRecipe):
    loop = run_rounds(loop_recipe, quiet=True)
    samplers = [{line["sampler"] for line in lines(loop.round(n).samples)} for n in (1, 2)]
    assert all(len(found) == 1 for found in samplers) and samplers[0] != samplers[1]
    recorded = load_recipe(loop.round(2).run.recipe_file)
    assert recorded.adapter.start_from == str(loop.round(1).run.adapter_folder)
    assert recorded.reference.kind == "start"


@pytest.mark.parametrize(
    ("adapter", "reference", "last", "start_from", "kind", "named"),
    [
        ("continue", "last", None, None, "base", None),
        ("continue", "last", "before", "before", "start", None),
        ("continue", "base", "before", "before", "base", None),
        ("fresh", "base", "before", None, "base", None),
        ("fresh", "last", "before", None, "adapter", "before"),
    ],
)
def test_who_is_trained_and_who_is_the_reference(
    loop_recipe: IterativeRecipe, tmp_path: Path, adapter, reference, last, start_from, kind, named
):
    rounds = dataclasses.replace(loop_recipe.rounds, adapter=adapter, reference=reference)
    given = dataclasses.replace(loop_recipe, rounds=rounds, adapter=Adapter(rank=4, lora_plus_ratio=4))
    made = recipe_of_round(given, 3, last=last, pairs=[tmp_path / "p"], held_out=None, run=tmp_path / "run")
    assert type(made) is Recipe
    assert (made.adapter.start_from, made.reference.kind, made.reference.adapter) == (start_from, kind, named)
    assert made.adapter.lora_plus_ratio == 4
    assert made.data.train == (str(tmp_path / "p"),) and not made.data.eval and made.data.max_rows is None
    assert made.training.seed == loop_recipe.training.seed + 3


def test_fresh_adapters_and_earlier_pairs_run(loop_recipe: IterativeRecipe):
    rounds = dataclasses.replace(loop_recipe.rounds, adapter="fresh", reference="last", earlier_pairs=1)
    loop = run_rounds(dataclasses.replace(loop_recipe, rounds=rounds), quiet=True)
    recorded = load_recipe(loop.round(2).run.recipe_file)
    assert recorded.data.train == (str(loop.round(1).pairs), str(loop.round(2).pairs))
    assert recorded.reference.adapter == str(loop.round(1).run.adapter_folder)


def models_alive() -> list[PreTrainedModel]:
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), PreTrainedModel)]


@pytest.mark.parametrize("judged_by", ["a function", "a reward model"])
def test_one_base_is_in_memory_in_every_stage(
    loop_recipe: IterativeRecipe, reward_run: Path, monkeypatch: pytest.MonkeyPatch, judged_by: str
):
    """Parameters of all models alive ≤ base + adapters + heads, while a stage runs and when it ends."""
    adapter = load_model(loop_recipe.base, loop_recipe.adapter)
    bytes_of_adapter = sum(p.nbytes for p in adapter.trainable.values())
    bytes_of_base = sum(p.nbytes for p in adapter.network.parameters()) - bytes_of_adapter
    bytes_of_reward = 0
    del adapter
    if judged_by == "a reward model":
        saved = load_file(reward_run / "adapter" / "adapter_model.safetensors")
        assert any(name.endswith("score.weight") for name in saved)
        bytes_of_reward = sum(tensor.nbytes for tensor in saved.values())
        loop_recipe = dataclasses.replace(loop_recipe, judge=Judge(f"reward:{reward_run}"))
    others = {id(model) for model in models_alive()}  # those that other tests keep
    seen: list[tuple[str, int, int]] = []

    def look(name: str) -> None:
        models = [model for model in models_alive() if id(model) not in others]
        owners = [model for model in models if hasattr(model, "lm_head")]
        unique = {id(p): p.nbytes for model in models for p in model.parameters()}
        seen.append((name, len(owners), sum(unique.values())))

    def watched(module, name: str) -> None:
        real = getattr(module, name)

        def stage(*arguments, **options):
            done = real(*arguments, **options)
            look(name)
            return done

        monkeypatch.setattr(module, name, stage)

    for name in ("sample_stage", "judge_stage", "train_stage"):
        watched(stages, name)
    watched(RewardModel, "rewards")
    run_rounds(loop_recipe, quiet=True)
    assert {name for name, _, _ in seen} >= {"sample_stage", "judge_stage", "train_stage"}
    assert ("rewards" in {name for name, _, _ in seen}) == (judged_by == "a reward model")
    for name, models, held in seen:
        assert models == 1, name
        # The policy, its reference, and the reward model with its head, at most.
        assert held <= bytes_of_base + 2 * bytes_of_adapter + bytes_of_reward, name


@pytest.fixture
def reward_run(recipe: Recipe, tmp_path: Path) -> Path:
    """A small reward model."""
    given = dataclasses.replace(recipe, adapter=Adapter(rank=4), run_directory=str(tmp_path / "reward"))
    return train_reward(given, quiet=True).path


def test_kl_is_the_mean_log_ratio_of_the_tokens_that_were_drawn(loop_recipe: IterativeRecipe):
    """Summed plainly, one sequence at a time, by the network itself."""
    loop = run_rounds(loop_recipe, quiet=True)
    base = load_model(loop_recipe.base)
    chat = chat_tokenizer(base.tokenizer, loop_recipe.data)
    prompts = {}
    for row in lines(loop.held_out_file):
        ids = chat.prompt_ids(tuple(row["prompt"])).tolist()
        prompts[prompt_key(ids)] = ids
    policy = load_adapter(base, str(loop.round(2).run.adapter_folder))
    ratios = []
    for line in lines(loop.round(2).held_out.samples):
        for response in line["responses"]:
            ids, start = [*prompts[line["id"]], *response["ids"]], len(prompts[line["id"]])
            drawn, found = torch.tensor(ids[start:])[:, None], []
            for role in (as_policy, as_base):
                with role(policy), torch.no_grad(), generating(policy):
                    logits = policy.network(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
                found.append(logits.double().log_softmax(-1).gather(-1, drawn).sum())
            ratios.append(float(found[0] - found[1]))
    told = loop.round(2).measures()
    assert told is not None
    assert told["kl"]["mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    assert abs(told["kl"]["mean"]) > 0.05


def test_each_policy_is_measured_with_the_same_noise_whatever_the_rounds_are_sampled_with(
    loop_recipe: IterativeRecipe, monkeypatch: pytest.MonkeyPatch
):
    loop_recipe = replaced(loop_recipe, ["sampling.temperature=0.5", "sampling.top_p=0.9"])
    settings = stages.held_out_sampling(loop_recipe)
    assert (settings.temperature, settings.top_p, settings.responses) == (1.0, 1.0, 2)
    used, real = [], stages.sample_stage

    def sample_stage(loop, number, prompts, settings, here):
        used.append((here.path.name, settings.seed))
        real(loop, number, prompts, settings, here)

    monkeypatch.setattr(stages, "sample_stage", sample_stage)
    loop = run_rounds(loop_recipe, quiet=True)
    held_out = {seed for name, seed in used if name == "held_out"}
    of_rounds = {seed for name, seed in used if name != "held_out"}
    assert held_out == {settings.seed} and len(of_rounds) == 2 and not held_out & of_rounds
    recorded = load_recipe(loop.round(2).run.recipe_file)
    assert recorded.data.eval == str(loop.round(1).held_out.pairs)


def test_two_reward_models_judge_one_after_the_other(
    loop_recipe: IterativeRecipe, recipe: Recipe, reward_run: Path, tmp_path: Path
):
    other = dataclasses.replace(recipe, adapter=Adapter(rank=2), run_directory=str(tmp_path / "other"))
    second = train_reward(override(other, ["training.seed=7"]), quiet=True).path
    words = [f"judge.of=reward:{reward_run}", f"rounds.held_out_judge=reward:{second}", "rounds.count=1"]
    loop = run_rounds(override(loop_recipe, words), quiet=True)
    assert all(line["reward"] != line["held_out_judge"] for line in lines(loop.rounds_file))


def test_the_implicit_reward_of_a_run_judges_and_that_of_a_bare_base_is_refused(
    loop_recipe: IterativeRecipe, recipe: Recipe, tmp_path: Path
):
    with pytest.raises(RecipeError, match=r"implicit:RUN"):
        override(loop_recipe, ["judge.of=implicit"])
    run = train(dataclasses.replace(recipe, run_directory=str(tmp_path / "dpo")), quiet=True)
    words = [f"judge.of=implicit:{run.path}", "rounds.count=1", "rounds.held_out_judge=null"]
    of_run = run_rounds(override(loop_recipe, words), quiet=True)
    begun = [f"adapter.start_from={run.path}", "judge.of=implicit", f"run_directory={tmp_path / 'own'}"]
    own = run_rounds(override(loop_recipe, [*words, *begun]), quiet=True)
    for loop in (of_run, own):
        rewards = {r["score"] for line in lines(loop.round(1).judged) for r in line["responses"]}
        assert len(rewards) > 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rounds.held_out_judge=functoin:x"], r"rounds\.held_out_judge got 'functoin:x'"),
        (["judge.of=function:missing.py:f"], r"missing\.py"),
        (["rounds.held_out_judge=reward:nowhere"], r"rounds\.held_out_judge got 'nowhere'"),
    ],
)
def test_a_judge_that_cannot_be_had_is_said_before_anything_is_sampled(
    loop_recipe: IterativeRecipe, words: list[str], reason: str
):
    with pytest.raises(UserError, match=reason):
        run_rounds(override(loop_recipe, words), quiet=True)
    there = {file.name for file in Path(loop_recipe.run_directory).glob("*")}
    assert there <= {".lock"}, "mended, the same command begins"


def test_a_judge_that_has_become_another_is_refused(loop_recipe: IterativeRecipe, tmp_path: Path):
    run_rounds(override(loop_recipe, ["rounds.count=1"]), quiet=True)
    (tmp_path / "rule.py").write_text(JUDGE.replace("0.05", "0.06"))
    with pytest.raises(RunError, match="cannot be compared"):
        run_rounds(loop_recipe, resume=True, accept=["rounds.count", "judge"], quiet=True)


def test_what_dealt_the_prompts_cannot_change(loop_recipe: IterativeRecipe):
    run_rounds(override(loop_recipe, ["rounds.count=1"]), quiet=True)
    for word in ("data.max_rows=8", "rounds.held_out_prompts=2", "training.seed=3"):
        accept = ["data", "rounds", "training"]
        with pytest.raises(RunError, match="cannot change in rounds that have begun"):
            run_rounds(override(loop_recipe, [word]), resume=True, accept=accept, quiet=True)


def test_what_is_accepted_reaches_the_run_that_was_begun(
    loop_recipe: IterativeRecipe, monkeypatch: pytest.MonkeyPatch
):
    one, real, seen = override(loop_recipe, ["rounds.count=1"]), stages.train, []

    def stopped(recipe, **options):
        options["on"] = None
        real(override(recipe, ["training.max_steps=1"]), **options)
        raise DataError("stopped here")

    monkeypatch.setattr(stages, "train", stopped)
    with pytest.raises(DataError, match="stopped here"):
        run_rounds(one, quiet=True)
    run = LoopDirectory(Path(one.run_directory)).round(1).run
    shutil.rmtree(run.adapter_folder)
    monkeypatch.setattr(stages, "train", lambda *a, **k: seen.append(k["accept"]) or real(*a, **k))
    changed = override(one, ["training.learning_rate=2e-2"])
    run_rounds(changed, resume=True, accept=["training", "judge", "rounds.count"], quiet=True)
    assert len(seen) == 1 and "training" in seen[0] and "judge" not in seen[0]
    assert load_recipe(run.recipe_file).training.learning_rate == 2e-2


def test_measures_that_were_deleted_are_made_again(loop_recipe: IterativeRecipe):
    loop = run_rounds(loop_recipe, quiet=True)
    before = results(loop)
    loop.round(1).measures_file.unlink()
    loop.round(1).seconds_file.write_text("{")
    run_rounds(loop_recipe, resume=True, quiet=True)
    assert results(loop) == before
    assert [line["round"] for line in lines(loop.rounds_file)] == [0, 1, 2]
    loop.round(2).measures_file.write_text("{}")
    with pytest.raises(RunError, match="delete it"):
        run_rounds(loop_recipe, resume=True, quiet=True)


def test_a_round_whose_adapter_is_not_as_it_was_written_is_not_gone_on_from(loop_recipe: IterativeRecipe):
    loop = run_rounds(override(loop_recipe, ["rounds.count=1"]), quiet=True)
    file = loop.round(1).run.adapter_folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match="not as the run wrote it"):
        run_rounds(loop_recipe, resume=True, accept=["rounds.count"], quiet=True)


def test_prompts_of_an_attempt_without_a_recipe_are_not_reused(loop_recipe: IterativeRecipe, tmp_path: Path):
    directory = LoopDirectory(tmp_path / "loop")
    directory.path.mkdir()
    for file in (directory.prompts_file, directory.held_out_file):
        file.write_text(json.dumps({"prompt": [{"role": "user", "content": "of another recipe"}]}) + "\n")
    prepare_prompts(loop_recipe, directory, Display(quiet=True))
    assert "of another recipe" not in directory.prompts_file.read_text() + directory.held_out_file.read_text()
    dealt = directory.prompts_file.read_bytes()
    directory.recipe_file.write_text(to_yaml(loop_recipe))
    prepare_prompts(replaced(loop_recipe, ["data.max_rows=8"]), directory, Display(quiet=True))
    assert directory.prompts_file.read_bytes() == dealt


def test_prompts_that_are_all_too_long_are_said(loop_recipe: IterativeRecipe):
    with pytest.raises(DataError, match="longer than 1 tokens"):
        run_rounds(override(loop_recipe, ["data.max_prompt_tokens=1"]), quiet=True)


def replaced(recipe: IterativeRecipe, words: list[str]) -> IterativeRecipe:
    found = override(recipe, words)
    assert isinstance(found, IterativeRecipe)
    return found


def test_the_base_is_loaded_once(loop_recipe: IterativeRecipe, monkeypatch: pytest.MonkeyPatch):
    from lora_dpo.model import loading

    real, loads = loading.load_base, []
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: loads.append(1) or real(*a, **k))
    run_rounds(loop_recipe, quiet=True)
    assert len(loads) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_loop_that_is_killed_in_every_stage_ends_as_one_that_was_not(
    loop_recipe: IterativeRecipe, reward_run: Path, tmp_path: Path, nursery: Nursery
):
    """A reward model judges, and a function beside it."""
    loop_recipe = dataclasses.replace(loop_recipe, judge=Judge(f"reward:{reward_run}"))
    file, cache = tmp_path / "loop.yaml", tmp_path / "cache"
    file.write_text(to_yaml(loop_recipe))
    loop = LoopDirectory(tmp_path / "loop")
    one, two = loop.round(1), loop.round(2)
    begun = {  # what is there once a stage has begun, in the order of the loop
        "measuring the start": loop.round(0).held_out.samples,
        "sampling": one.samples,
        "judging": one.judged,
        "pairing": one.pairs,
        "training": one.run.checkpoint_folder(1),
        "measuring": one.held_out.samples,
        "sampling again": two.samples,
        "judging again": two.judged,
        "training again": two.run.checkpoint_folder(1),
        "a second opinion": two.second_opinion,
    }
    killed = []
    whole = nursery.start(
        ["rounds", file, f"run_directory={tmp_path / 'whole'}"], tmp_path / "w", cache=cache
    )
    assert whole.wait() == 0, whole.stderr
    for stage, sign in begun.items():
        resume = ["--resume"] if loop.recipe_file.exists() else []
        child = nursery.start(["rounds", file, *resume], tmp_path / "k", cache=cache)
        while child.poll() is None and not sign.exists():
            time.sleep(0.0005)
        child.signal(signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:
            killed.append(stage)
        else:
            assert child.status == 0, child.stderr
    last = nursery.start(["rounds", file, "--resume"], tmp_path / "k", cache=cache)
    assert last.wait() == 0, last.stderr
    assert len(killed) >= 8, killed
    for number in (1, 2):
        found = [line["id"] for line in lines(loop.round(number).samples)]
        assert len(found) == len(set(found)) == 6
    assert results(loop) == results(LoopDirectory(tmp_path / "whole"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_loop_with_its_status_and_a_word_on_how_to_go_on(
    loop_recipe: IterativeRecipe, tmp_path: Path, nursery: Nursery, number: int
):
    file, loop = tmp_path / "loop.yaml", LoopDirectory(tmp_path / "loop")
    file.write_text(to_yaml(loop_recipe))
    child = nursery.start(["rounds", file], tmp_path / "k", cache=tmp_path / "cache")
    while child.poll() is None and not loop.round(1).samples.exists():
        time.sleep(0.0005)
    child.signal(number)
    assert child.wait() == 128 + number, child.stderr
    assert child.stderr.strip().splitlines()[-1] == (
        "stopped; the same command with --resume goes on where it was"
    )
    again = nursery.start(["rounds", file, "--resume"], tmp_path / "k", cache=tmp_path / "cache")
    assert again.wait() == 0, again.stderr


def test_a_finished_loop_is_not_done_again_and_more_rounds_can_follow(
    loop_recipe: IterativeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    loop = run_rounds(loop_recipe, quiet=True)
    before = results(loop)
    monkeypatch.setattr("lora_dpo.rounds.loop.load_model", lambda *a: pytest.fail("loaded for nothing"))
    run_rounds(loop_recipe, resume=True)
    assert "done already" in capsys.readouterr().out
    monkeypatch.undo()
    more = override(loop_recipe, ["rounds.count=3"])
    with pytest.raises(RunError, match=r"--accept rounds\.count"):
        run_rounds(more, resume=True, quiet=True)
    run_rounds(more, resume=True, accept=["rounds.count"], quiet=True)
    after = results(loop)
    assert before.items() <= after.items() and "round-3/measures.json" in after


def test_a_folder_that_holds_rounds_or_none_is_said(loop_recipe: IterativeRecipe):
    with pytest.raises(RunError, match="there are no rounds"):
        run_rounds(loop_recipe, resume=True, quiet=True)
    run_rounds(override(loop_recipe, ["rounds.count=1"]), quiet=True)
    with pytest.raises(RunError, match="already holds rounds"):
        run_rounds(loop_recipe, quiet=True)


def told(directory: LoopDirectory, *figures: tuple[float, float]) -> None:
    for number, (reward, kl) in enumerate(figures):
        here = directory.round(number)
        here.path.mkdir(parents=True, exist_ok=True)
        interval = {"low": 0.0, "high": 1.0}
        values = {"round": number, "reward": interval | {"mean": reward}, "kl": interval | {"mean": kl}}
        values["guard"] = {}
        here.measures_file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("figures", "patience", "max_kl", "best", "why"),
    [
        ([(0, 0), (1, 1), (2, 2)], 1, None, 2, ""),
        ([(0, 0), (1, 1), (0.5, 2)], 1, None, 1, "did not rise for 1 round"),
        ([(0, 0), (1, 1), (0.5, 2)], 2, None, 1, ""),
        ([(0, 0), (1, 1), (0.5, 2), (0.9, 2)], 2, None, 1, "did not rise for 2 rounds"),
        ([(0, 0), (1, 1), (0.5, 2), (0.9, 2)], 0, None, 1, ""),
        ([(0, 0), (-1, 1)], 1, None, 0, "did not rise"),
        ([(0, 0), (1, 1), (3, 9)], 1, 5.0, 1, "above rounds.max_kl=5"),
    ],
)
def test_when_the_loop_ends_and_which_round_is_best(
    loop_recipe: IterativeRecipe, tmp_path: Path, figures, patience, max_kl, best, why
):
    rounds = dataclasses.replace(loop_recipe.rounds, count=9, patience=patience, max_kl=max_kl)
    directory = LoopDirectory(tmp_path / "told")
    told(directory, *figures)
    found = verdict(dataclasses.replace(loop_recipe, rounds=rounds), directory)
    assert found.best == best
    assert (why in found.stop) if why else not found.stop


def test_a_later_round_without_a_pair_ends_the_loop_and_a_first_one_is_an_error(
    loop_recipe: IterativeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    loop = run_rounds(override(loop_recipe, ["rounds.count=1"]), quiet=True)
    strict = override(loop_recipe, ["rounds.count=2", "pairing.min_margin=1e6"])
    run_rounds(strict, resume=True, accept=["rounds.count", "pairing"])
    out = capsys.readouterr().out
    assert "round 2 ends the loop" in out and "no prompt gives a pair" in out
    assert loop.round(1).measures() is not None and loop.round(2).measures() is None
    with pytest.raises(DataError, match="no prompt gives a pair"):
        run_rounds(override(strict, [f"run_directory={tmp_path / 'other'}"]), quiet=True)


def test_a_loop_stops_early_and_says_why(
    loop_recipe: IterativeRecipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = stages.measure

    def measured(*given):
        found = real(*given)
        return found | {"kl": found["kl"] | {"mean": 9.0}}

    monkeypatch.setattr(stages, "measure", measured)
    loop = run_rounds(override(loop_recipe, ["rounds.max_kl=5", "rounds.count=3"]))  # pyright: ignore
    out = capsys.readouterr().out
    assert "above rounds.max_kl=5" in out and "no round's policy is better" in out
    assert loop.round(1).measures() is not None and not loop.round(2).path.exists()


def test_prompts_are_all_dealt_before_any_comes_again(loop_recipe: IterativeRecipe):
    prompts = [Prompt(str(n), Where("x", n)) for n in range(20)]
    rounds = [[item.prompt for item in prompts_of_round(loop_recipe, prompts, n)] for n in range(1, 11)]
    dealt = [text for part in rounds for text in part]
    assert all(len(set(part)) == len(part) for part in rounds)
    assert len(set(dealt[:18])) == 18
    assert {dealt.count(item.prompt) for item in prompts} <= {2, 3, 4}
    everything = dataclasses.replace(
        loop_recipe, rounds=dataclasses.replace(loop_recipe.rounds, prompts=None)
    )
    assert {item.prompt for item in prompts_of_round(everything, prompts, 4)} == set(dealt)


def test_a_loops_recipe_survives_yaml_and_takes_overrides(loop_recipe: IterativeRecipe, tmp_path: Path):
    again = from_dict(to_dict(loop_recipe))
    assert again == loop_recipe
    changed = override(
        loop_recipe, ["rounds.count=5", "sampling.temperature=0.7", "pairing.min_margin=1", "judge.beta=2"]
    )
    assert isinstance(changed, IterativeRecipe)
    assert (changed.rounds.count, changed.sampling.temperature, changed.pairing.min_margin) == (5, 0.7, 1.0)
    with pytest.raises(RecipeError, match=r"did you mean rounds\.count"):
        override(loop_recipe, ["rounds.cuont=5"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling": Sampling(responses=1)}, "at least 2 responses"),
        ({"reference": Reference(sync_every=3)}, "rounds.reference chooses it"),
        ({"data": Data("x.jsonl")}, "held-out prompts"),
    ],
)
def test_what_rounds_cannot_be_is_refused(loop_recipe: IterativeRecipe, changes, reason):
    with pytest.raises(RecipeError, match=reason):
        dataclasses.replace(loop_recipe, **changes)


def test_train_and_rounds_each_refuse_the_others_recipe(loop_recipe: IterativeRecipe, recipe: Recipe):

    with pytest.raises(RecipeError, match="lora-dpo rounds"):
        train(loop_recipe, quiet=True)
    with pytest.raises(RecipeError, match="IterativeRecipe"):
        run_rounds(recipe, quiet=True)
