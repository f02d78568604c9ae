"""Shift: what the policy's own samples say of how far it has moved from its data."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from builders import float64_model, llama_config, random_branches

from lora_dpo.attention import NAME
from lora_dpo.finished import open_finished, shift_of_run
from lora_dpo.losses import DPO, KTO, SFT
from lora_dpo.model import Model, as_reference
from lora_dpo.preferences import Where
from lora_dpo.recipe import Recipe, Shift, load_recipe, override
from lora_dpo.run_directory import MANIFEST, RunDirectory
from lora_dpo.run_directory.manifest import manifest_of
from lora_dpo.sampling import Response
from lora_dpo.shift import (
    Measured,
    data_responses,
    data_sides,
    measure_shift,
    metrics,
    side_by_side,
    some_prompts,
)
from lora_dpo.tokenization import Branches, share
from lora_dpo.training import Record, Stopped, train
from lora_dpo.training.fading import Fading

SHIFT = import_module("lora_dpo.shift")
METER = import_module("lora_dpo.training.shift_meter")
SIDES = ("chosen", "rejected")
STOP = 5


def pairs(count: int, *, prefix: int = 7, rests: Sequence[int] = (9, 4)) -> list[Branches]:
    """Random pairs whose prompts differ."""
    rng = np.random.default_rng(3)
    return [random_branches(rng, prefix + n, rests, row=n + 1) for n in range(count)]


def plain_logprob(model: Model, ids: Sequence[int], start: int) -> float:
    """log p of ids[start:], in nats, by the whole model on this sequence alone, with its own attention."""
    logits = model.network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    picked = torch.log_softmax(logits, dim=-1)[range(len(ids) - 1), list(ids[1:])]
    return float(picked[start - 1 :].sum())


def plain_shift(model: Model, items: Sequence[Branches], made: list[list[Response]]) -> dict[str, float]:
    """The same figures, response by response."""
    model.causal.set_attn_implementation("eager")
    sums: dict[str, list[float]] = {name: [0.0, 0.0, 0] for name in (*SIDES, "own")}
    kl = []
    for item, responses in zip(items, made, strict=True):
        prompt = item.prompt_ids.tolist()
        texts = [(side, item.side(n).tolist()[len(prompt) :]) for n, side in enumerate(SIDES)]
        texts += [("own", [*r.ids, *([STOP] if r.finished else [])]) for r in responses]
        for name, tokens in texts:
            with torch.no_grad():
                policy = plain_logprob(model, prompt + tokens, len(prompt))
            with as_reference(model):
                reference = plain_logprob(model, prompt + tokens, len(prompt))
            if name == "own":
                kl.append(policy - reference)
            for n, value in enumerate((policy, reference, len(tokens))):
                sums[name][n] += value
    model.causal.set_attn_implementation(NAME)
    own, _, tokens = sums["own"]
    expected = {"own_logps": own / tokens, "kl": float(np.mean(kl)), "kl_per_token": sum(kl) / tokens}
    for side in SIDES:
        policy, reference, count = sums[side]
        expected[f"{side}_gap"] = own / tokens - policy / count
        expected[f"{side}_change"] = (policy - reference) / count
    finished = [r.finished for responses in made for r in responses]
    expected["length"] = tokens / len(finished)
    expected["unfinished"] = 1 - sum(finished) / len(finished)
    return {f"shift/{name}": value for name, value in expected.items()}


def test_figures_equal_those_of_single_sequences(monkeypatch: pytest.MonkeyPatch):
    model, items = float64_model(llama_config()), pairs(5)
    made: list[list[Response]] = []
    genuine = SHIFT.sample

    def kept(*given: Any, **named: Any) -> list[list[Response]]:
        made.extend(found := genuine(*given, **named))
        return found

    monkeypatch.setattr(SHIFT, "sample", kept)
    settings = Shift(responses=3, max_new_tokens=40)
    # A budget that a prompt and its five responses pass, and one that holds several of them.
    both = [
        measure_shift(model, items, settings, sides=SIDES, stop_ids=[STOP], tokens_per_microbatch=budget)
        for budget in (1, 150)
    ]
    assert any(r.finished for responses in made for r in responses), "the stop token is scored somewhere"
    assert made[:5] == made[5:]
    expected = plain_shift(model, items, made[:5])
    assert expected["shift/kl"] > 0.01
    for got in both:
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, abs=1e-6)  # rotary embeddings are float32


def test_the_kl_is_the_kl():
    """Of responses of one token it can be worked out from the whole distributions."""
    model, items = float64_model(llama_config(initializer_range=0.1)), pairs(2)
    settings = Shift(responses=1500, max_new_tokens=1)
    got = measure_shift(model, items, settings, sides=SIDES, stop_ids=[STOP], tokens_per_microbatch=4096)
    exact, variance = [], []
    model.causal.set_attn_implementation("eager")
    for item in items:
        ids = torch.from_numpy(item.prompt_ids.astype(np.int64))[None]
        with torch.no_grad():
            policy = torch.log_softmax(model.network(input_ids=ids).logits[0, -1].double(), dim=-1)
        with as_reference(model):
            reference = torch.log_softmax(model.network(input_ids=ids).logits[0, -1].double(), dim=-1)
        mean = (policy.exp() * (policy - reference)).sum()
        exact.append(float(mean))
        variance.append(float((policy.exp() * (policy - reference - mean) ** 2).sum()))
    error = math.sqrt(sum(variance) / 2 / 3000)
    assert error < 0.1 * np.mean(exact)
    assert got["shift/kl"] == pytest.approx(np.mean(exact), abs=4 * error)


def test_an_untrained_policy_has_moved_by_exactly_nothing():
    model = float64_model(llama_config())
    for name, parameter in model.trainable.items():
        if "lora_B" in name:
            parameter.data.zero_()
    got = measure_shift(model, pairs(4), Shift(max_new_tokens=8), sides=SIDES, stop_ids=[STOP])
    for name in ("kl", "kl_per_token", "chosen_change", "rejected_change"):
        assert got[f"shift/{name}"] == 0.0


def test_figures_by_hand():
    policy = torch.tensor([[-6.0, -9.0, -2.0, -4.0], [-2.0, -3.0, -3.0, -1.0]])
    reference = torch.tensor([[-4.0, -8.0, -2.0, -6.0], [-1.0, -3.0, -5.0, -2.0]])
    lengths = torch.tensor([[3, 2, 1, 4], [1, 4, 2, 3]])
    finished = torch.tensor([[True, False], [True, True]])
    measured = Measured(policy.double(), reference.double(), lengths, finished)
    assert metrics(measured, SIDES) == pytest.approx(
        {
            "shift/own_logps": -1.0,  # −10 nats over 10 tokens
            "shift/chosen_gap": -1 + 8 / 4,
            "shift/rejected_gap": -1 + 12 / 6,
            "shift/kl": (0 + 2 + 2 + 1) / 4,
            "shift/kl_per_token": 5 / 10,
            "shift/chosen_change": (-2 - 1) / 4,
            "shift/rejected_change": -1 / 6,
            "shift/length": 2.5,
            "shift/unfinished": 0.25,
        }
    )


def test_prompts_are_distinct_and_follow_from_the_seed():
    items = pairs(6)
    twice = [*items, *items]
    for count in (1, 4, 6, 20):
        chosen = some_prompts(twice, count, seed=1)
        assert len({item.prompt_ids.tobytes() for item in chosen}) == len(chosen) == min(count, 6)
        assert [c.key for c in chosen] == [c.key for c in some_prompts(twice, count, seed=1)]
    orders = {tuple(item.where.row for item in some_prompts(items, 6, seed=seed)) for seed in range(9)}
    assert len(orders) > 5
    short = some_prompts(items, 6, seed=0, longest=8)
    assert sorted(len(item.prompt_ids) for item in short) == [6, 7, 8]


def test_the_prompt_is_what_stands_before_the_first_scored_token():
    ids = np.arange(10, dtype=np.int32)
    masks = np.zeros((2, 10), dtype=bool)
    masks[0, 4:] = masks[1, 6:] = True
    item = share([ids, np.r_[ids[:7], 9, 9, 9]], list(masks), Where("file", 1))
    assert item.prompt_ids.tolist() == [0, 1, 2, 3]
    assert item.only([1]).prompt_ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_response_counts_up_to_the_end_of_its_first_turn_and_no_further_than_a_sample():
    ids = np.arange(12, dtype=np.int32)
    turns = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], dtype=bool)
    one = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=bool)
    item = share([ids, ids[::-1]], [turns, one], Where("file", 1))
    for tokens, lengths in ((99, [6, 12]), (3, [6, 6]), (2, [5, 5])):
        cut = data_responses(item, 2, tokens)
        assert [len(cut.side(n)) for n in range(2)] == lengths
        assert [cut.scored_count(n) for n in range(2)] == [length - 3 for length in lengths]
        for n, side in enumerate((ids, ids[::-1])):
            assert cut.side(n).tolist() == side[: lengths[n]].tolist()
    assert data_responses(item, 1, 99).sides == 1


def test_samples_stand_beside_the_data_token_by_token():
    item = pairs(1, prefix=4, rests=(3, 5))[0]
    made = [Response([7, 8], True), Response([9, 9, 9], False), Response([], True, stop=6)]
    together = side_by_side(item, made, [STOP, 6])
    prompt = item.prompt_ids.tolist()
    assert [together.side(n).tolist() for n in range(2)] == [item.side(n).tolist() for n in range(2)]
    assert [together.side(n).tolist() for n in (2, 3, 4)] == [
        [*prompt, 7, 8, STOP],
        [*prompt, 9, 9, 9],
        [*prompt, 6],
    ]
    assert [together.scored_count(n) for n in (2, 3, 4)] == [3, 3, 1]
    for n in (2, 3, 4):
        assert np.flatnonzero(together.scored[n])[0] == len(prompt)


def test_only_what_the_data_say_of_a_prompt_is_beside_its_samples():
    assert data_sides(DPO()) == ("chosen", "rejected")
    assert data_sides(SFT()) == ("response",)
    assert data_sides(KTO()) == ("completion",)


ORDINARY = {
    "shift/own_logps": -1.0,
    "shift/chosen_gap": 0.2,
    "shift/rejected_gap": 0.3,
    "shift/kl": 0.0,
    "shift/kl_per_token": 0.0,
}


def seen(*changes: dict[str, float], fading: Fading | None = None) -> list[int]:
    """Whether something was said of each measurement: the first one, and others that differ from it."""
    fading = fading or Fading(Shift())
    series = [ORDINARY, *({f"shift/{k}": v for k, v in change.items()} for change in changes)]
    return [len(fading.see(ORDINARY | change)) for change in series]


GONE = {"chosen_gap": 1.2, "rejected_gap": 2.0, "kl": 30.0, "kl_per_token": 0.8}


def test_a_fading_signal_is_said_once_a_doubling():
    assert seen(GONE, GONE) == [0, 1, 0]
    # Chosen is the nearer one: it is now twice as far from where it was.
    assert seen(GONE, GONE | {"chosen_gap": 2.1}, GONE | {"chosen_gap": 2.3, "rejected_gap": 9.0}) == [
        0,
        1,
        0,
        1,
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"chosen_gap": 0.2},  # what DPO is for: rejected ones alone are left behind
        {"rejected_gap": 0.3},
        {"chosen_gap": 0.7},  # under half of the 1.3 nats a token that rejected ones began with
        {"kl_per_token": 0.1},
        {"chosen_gap": math.nan},
    ],
)
def test_an_ordinary_run_is_left_alone(change: dict[str, float]):
    assert seen(GONE | change) == [0, 0]


def test_samples_that_stay_less_likely_than_the_data_are_no_fading_signal():
    fading = Fading(Shift())
    first = ORDINARY | {"shift/chosen_gap": -1.8, "shift/rejected_gap": -1.6}
    assert fading.see(first) == []
    assert (
        fading.see(first | {"shift/chosen_gap": -0.1, "shift/rejected_gap": 0.8, "shift/kl_per_token": 0.9})
        == []
    )


def test_the_warning_names_the_remedies():
    fading = Fading(Shift())
    fading.see(ORDINARY)
    (line,) = fading.see(ORDINARY | {f"shift/{name}": value for name, value in GONE.items()})
    for word in (
        "lora-dpo rounds",
        "reward model",
        "loss.beta",
        "training.learning_rate",
        "DPOP",
        "1.2 nats",
    ):
        assert word in line


def test_the_warning_survives_a_checkpoint_and_begins_anew_with_other_settings():
    fading = Fading(Shift())
    assert fading.state() == {}
    assert seen(GONE, fading=fading) == [0, 1]
    again, other = Fading(Shift()), Fading(Shift(prompts=3))
    state = json.loads(json.dumps(fading.state()))
    again.restore(state)
    other.restore(state)
    assert seen(GONE, fading=again) == [0, 0]
    assert seen(GONE, fading=other) == [0, 1]


def adapter_bytes(run: RunDirectory) -> bytes:
    return (run.adapter_folder / "adapter_model.safetensors").read_bytes()


def shift_of(run: RunDirectory) -> list[tuple[int, str, dict[str, float]]]:
    """Every measurement of a run: step, kind of record, figures."""
    records = [(r["step"], r["kind"], {k: v for k, v in r.items() if "shift" in k}) for r in run.records()]
    return [record for record in records if record[2]]


def no_samples(*given: Any, **named: Any) -> Any:
    raise AssertionError("nothing is to be sampled")


def test_looking_changes_nothing_and_not_looking_samples_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = override(recipe, ["training.eval_every=2", "shift.max_new_tokens=9"])
    on = train(override(recipe, [f"run_directory={tmp_path / 'on'}"]), quiet=True)
    assert [(step, kind) for step, kind, _ in shift_of(on)] == [
        (0, "shift"),
        (2, "evaluation"),
        (4, "evaluation"),
        (6, "evaluation"),
    ]
    monkeypatch.setattr(SHIFT, "sample", no_samples)
    off = train(override(recipe, ["shift.prompts=0"]), quiet=True)
    assert shift_of(off) == []
    assert adapter_bytes(on) == adapter_bytes(off)
    losses = [[r["eval/loss"] for r in run.records() if r["kind"] == "evaluation"] for run in (on, off)]
    assert losses[0] == losses[1]


def test_a_run_begins_as_its_reference_and_moves(recipe: Recipe):
    run = train(override(recipe, ["shift.prompts=8", "training.max_steps=20"]), quiet=True)
    (_, _, begun), (_, _, ended) = shift_of(run)
    assert shift_of_run(open_finished(run.path)) == pytest.approx(ended, abs=1e-5)
    assert begun["shift/kl"] == begun["shift/chosen_change"] == begun["shift/rejected_change"] == 0.0
    # Eight held-out prompts: the pairs are all of them, though only as far as a sample may go.
    assert ended["shift/rejected_change"] < ended["shift/chosen_change"]
    assert ended["shift/kl"] > 0
    assert ended["shift/rejected_gap"] - begun["shift/rejected_gap"] > 0


def test_a_run_that_dies_and_resumes_has_the_same_figures(recipe: Recipe, tmp_path: Path):
    recipe = override(recipe, ["training.eval_every=2", "training.save_every=3", "shift.every=1"])
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    assert [step for step, _, _ in shift_of(whole)] == list(range(7))

    class Crash(Exception):
        pass

    for at, resume in ((0, False), (2, True), (5, True)):

        def crash(record: Record, at: int = at) -> None:
            if record.step == at:
                raise Crash

        with pytest.raises(Crash):
            train(recipe, observers=[crash], resume=resume, quiet=True)
    run = train(recipe, resume=True, quiet=True)
    assert shift_of(run) == shift_of(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)
    states = [json.loads((r.checkpoint_folder(6) / "state.json").read_text()) for r in (run, whole)]
    assert states[0]["shift"] == states[1]["shift"] and states[0]["shift"]["first"]


@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_while_it_is_measured_breaks_it_off(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    recipe = override(recipe, ["training.eval_every=2", "training.save_every=3"])
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    genuine, calls = SHIFT.sample, []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + at // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step-000002" if at else "first step"):
        patch.setattr(SHIFT, "sample", interrupted)
        train(recipe, quiet=True)
    run = RunDirectory(Path(recipe.run_directory))
    assert [folder.name for folder in run.checkpoints()] == ["step-000002"][: at // 2]
    run = train(recipe, resume=True, quiet=True)
    assert shift_of(run) == shift_of(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_without_held_out_rows_it_is_measured_on_training_prompts(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    run = train(override(recipe, ["data.eval_last=0", "shift.every=4"]))
    assert [(step, kind) for step, kind, _ in shift_of(run)] == [(0, "shift"), (4, "shift"), (6, "shift")]
    said = capsys.readouterr().out
    assert said.count("measured on prompts that are trained on") == 1
    assert "step 6: own samples: KL " in said


@pytest.mark.parametrize(
    ("loss", "sides"),
    [("SFT", ["response"]), ("KTO", ["completion"]), ("SimPO", ["chosen", "rejected"])],
)
def test_what_an_objective_has_is_measured(recipe: Recipe, loss: str, sides: list[str]):
    run = train(override(recipe, [f"loss={loss}", "training.max_steps=2"]), quiet=True)
    (_, _, begun), (_, _, ended) = shift_of(run)
    names = {"own_logps", "kl", "kl_per_token", "length", "unfinished"}
    names |= {f"{side}_{what}" for side in sides for what in ("gap", "change")}
    assert begun.keys() == ended.keys() == {f"shift/{name}" for name in names}
    assert begun["shift/kl"] == 0.0


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), KeyError("an odd architecture")]
)
def test_a_measurement_that_fails_ends_no_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
):
    calls = []

    def failing(*given: Any, **named: Any) -> Any:
        calls.append(1)
        raise error

    monkeypatch.setattr(METER, "measure_shift", failing)
    run = train(override(recipe, ["training.eval_every=2"]))
    said = capsys.readouterr().out
    assert len(calls) == 1 and said.count("is left out from here on") == 1
    assert ("memory ran out" in said) == isinstance(error, RuntimeError)
    assert shift_of(run) == [] and run.adapter_folder.exists()


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    run = train(override(recipe, ["shift.max_new_tokens=1020", "training.max_steps=1"]))
    assert shift_of(run) == []
    assert "no prompt leaves room for shift.max_new_tokens (1020)" in capsys.readouterr().out


def test_a_run_of_an_older_version_goes_on(recipe: Recipe):
    recipe = override(recipe, ["training.save_every=2"])

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.step == 3:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, observers=[crash], quiet=True)
    run = RunDirectory(Path(recipe.run_directory))
    for file in (run.recipe_file, run.checkpoint_folder(2) / "recipe.yaml"):
        values = yaml.safe_load(file.read_text())
        del values["shift"]
        file.write_text(yaml.safe_dump(values))
    assert load_recipe(run.recipe_file).shift == Shift()
    state = run.checkpoint_folder(2) / "state.json"
    values = json.loads(state.read_text())
    del values["shift"]
    state.write_text(json.dumps(values))
    (run.checkpoint_folder(2) / MANIFEST).write_bytes(manifest_of(run.checkpoint_folder(2)))
    train(recipe, resume=True, quiet=True)
    # Nothing of before it is known, and what it began with isn't measured after two steps.
    assert [(step, kind) for step, kind, _ in shift_of(run)] == [(0, "shift"), (6, "evaluation")]
