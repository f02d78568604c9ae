"""Runs that train reward models: they learn, go on after a crash, are exported, and put on a base."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pair_rows, save_small_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_reward import ASK, by_transformers, conversations, flat, in_one_batch, one_at_a_time
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from typer.testing import CliRunner

from lora_dpo import evaluation as evaluation_module
from lora_dpo.cli import app
from lora_dpo.errors import DataError, ModelError, RunError
from lora_dpo.export import Options, export_merged, find_source
from lora_dpo.export.kinds import export
from lora_dpo.finished import evaluate_run, open_finished
from lora_dpo.losses import DPO, BradleyTerry
from lora_dpo.model import load_model
from lora_dpo.recipe import (
    Adapter,
    Base,
    Data,
    Recipe,
    Reference,
    Training,
    load_recipe,
    override,
    to_yaml,
)
from lora_dpo.reward import RewardModel, applying, as_reward_recipe, train_reward
from lora_dpo.run_directory import RunDirectory
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Display, Record, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def tensors_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_folder / "adapter_model.safetensors")


@pytest.fixture
def reward_recipe(recipe: Recipe) -> Recipe:
    return override(dataclasses.replace(recipe, loss=BradleyTerry()), ["adapter.dropout=0"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run on an NF4 base, of which eight pairs were held out."""
    place = tmp_path_factory.mktemp("reward")
    rows = place / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    recipe = Recipe(
        Base(str(save_small_model(place / "base")), compute_dtype="float32"),
        Data(str(rows), eval_last=8),
        BradleyTerry(centering=0.01),
        Adapter(rank=4),
        training=Training(pairs_per_step=8, learning_rate=1e-2, max_steps=12, epochs=20),
        run_directory=str(place / "run"),
    )
    return train_reward(recipe, quiet=True)


def put_on(run: RunDirectory) -> RewardModel:
    model = load_model(load_recipe(run.recipe_file).base)
    return RewardModel.put_on(model, run.path, ChatTokenizer(model.tokenizer))


def test_a_run_starts_at_ln_2_and_learns_which_response_is_preferred(run: RunDirectory):
    records = [record for record in run.records() if record["kind"] == "step"]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert records[0]["rewards/accuracy"] == 0.5
    assert records[-1]["rewards/accuracy"] > 0.9 and records[-1]["loss"] < 0.2
    assert not [name for name in records[0] if name.startswith("logps")]
    result = evaluate_run(open_finished(run.path))
    accuracy = result.metrics["rewards/accuracy"]
    assert result.examples == 8 and accuracy.low <= accuracy.mean <= accuracy.high
    assert accuracy.mean > 0.8 and not [name for name in result.metrics if name.startswith("logps")]


def test_its_adapter_is_one_for_sequence_classification(run: RunDirectory):
    config = json.loads((run.adapter_folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert not [name for name in config["target_modules"] if name.endswith("score")]
    head = tensors_of(run)["base_model.model.score.weight"]
    assert head.shape == (1, 64) and head.dtype == torch.float32 and head.any()


@pytest.mark.parametrize("skip", [None, ["score"]], ids=["by itself", "named"])
def test_transformers_loads_the_run_on_an_nf4_base(run: RunDirectory, skip: list[str] | None):
    """transformers leaves the last module of a model unquantized, and so the score head; and so it does where
    it is told to.
    """
    rewarder = put_on(run)
    items = conversations(rewarder)
    options: dict[str, Any] = {"llm_int8_skip_modules": skip} if skip else {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    base = load_recipe(run.recipe_file).base
    theirs = by_transformers(base.model, run.adapter_folder, quantization_config=quantization)
    assert type(theirs.base_model.model.score.modules_to_save["default"]) is torch.nn.Linear  # pyright: ignore
    found = flat(rewarder.rewards(items))
    assert found == pytest.approx(flat(one_at_a_time(theirs, items)), abs=1e-5)
    pad = theirs.config.pad_token_id
    for left in (False, True):
        assert found == pytest.approx(in_one_batch(theirs, items, pad, left), abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_adapter(reward_recipe: Recipe, tmp_path: Path):
    recipe = override(reward_recipe, ["adapter.dropout=0.1", "training.save_every=2"])
    whole = train_reward(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == 5:
            raise Crash

    with pytest.raises(Crash):
        train_reward(recipe, observers=[crash], quiet=True)
    resumed = train_reward(recipe, resume=True, quiet=True)
    a, b = tensors_of(whole), tensors_of(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_another_objective_gives_way_and_that_is_said(recipe: Recipe):
    said: list[str] = []
    assert as_reward_recipe(recipe, said.append).loss == BradleyTerry()
    assert said == ["loss: BradleyTerry, in place of the recipe's DPO"]
    own = dataclasses.replace(recipe, loss=BradleyTerry(offset=1.0))
    assert as_reward_recipe(own, said.append) is own and len(said) == 1


def test_it_can_start_from_a_language_models_adapter_and_from_a_reward_models(
    reward_recipe: Recipe, tmp_path: Path
):
    steps = ["training.max_steps=2", "adapter.rank=16"]
    policy = train(
        override(
            dataclasses.replace(reward_recipe, loss=DPO()), [*steps, f"run_directory={tmp_path / 'dpo'}"]
        ),
        quiet=True,
    )
    begin = [f"adapter.start_from={policy.path}", f"run_directory={tmp_path / 'first'}", *steps]
    first = train_reward(override(reward_recipe, begin), quiet=True)
    assert next(first.records())["loss"] == pytest.approx(math.log(2), abs=1e-12), "a new head"
    go_on = [f"adapter.start_from={first.path}", f"run_directory={tmp_path / 'second'}", *steps]
    second = train_reward(override(reward_recipe, [*go_on, "training.learning_rate=1e-9"]), quiet=True)
    head = "base_model.model.score.weight"
    assert torch.allclose(tensors_of(first)[head], tensors_of(second)[head], atol=1e-7)
    assert next(second.records())["loss"] != pytest.approx(math.log(2), abs=1e-4), "the head of before"


# Putting it on a base, and rewarding


def test_responses_of_one_prompt_are_rewarded_together_as_they_are_alone(run: RunDirectory):
    rewarder = put_on(run)
    responses = ["the dog", "", "the dog ate the red hat", "no no", "the dog", "no"]
    together = rewarder.branches(ASK, responses)
    assert together.sides == 6 and len(together.prefix) > 10, "the prompt is stored once"
    single = [rewarder.branches(ASK, [response]) for response in responses]
    told: list[int] = []
    [found] = rewarder.rewards([together], progress=told.append)
    assert found == pytest.approx(flat(rewarder.rewards(single)), abs=1e-5)
    assert found[0] == found[4] and sum(told) == 6
    for budget in (1, 60, 100):
        assert rewarder.rewards([together], tokens_per_microbatch=budget)[0] == pytest.approx(found, abs=1e-5)


def test_examples_of_different_numbers_of_responses_keep_their_order(run: RunDirectory):
    rewarder = put_on(run)
    items = conversations(rewarder)
    one_by_one = [rewarder.rewards([item])[0] for item in items]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = rewarder.rewards([items[n] for n in order])
        assert [len(row) for row in found] == [items[n].sides for n in order]
        assert flat(found) == pytest.approx(flat([one_by_one[n] for n in order]), abs=1e-5)


def test_when_memory_runs_out_smaller_micro_batches_go_on(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    rewarder, real = put_on(run), applying.sequence_rewards
    items = [rewarder.branches(ASK, [row["chosen"], row["rejected"]]) for row in pair_rows(6)]
    expected = flat(rewarder.rewards(items))

    def small(model: Any, batch: Any) -> torch.Tensor:
        if batch.tokens > 130:
            raise torch.OutOfMemoryError
        return real(model, batch)

    monkeypatch.setattr(applying, "sequence_rewards", small)
    monkeypatch.setattr(evaluation_module, "give_back_memory", lambda: None)
    said: list[str] = []
    assert flat(rewarder.rewards(items, say=said.append)) == pytest.approx(expected, abs=1e-5)
    assert said and "goes on with" in said[0]


def test_a_conversation_that_nothing_is_left_of_is_an_error(run: RunDirectory):
    model = load_model(load_recipe(run.recipe_file).base)
    rewarder = RewardModel.put_on(model, run.path, ChatTokenizer(model.tokenizer, max_tokens=1))
    with pytest.raises(DataError, match=r"data\.max_tokens"):
        rewarder.branches(ASK, ["the dog"])


def save_by_peft(folder: Path, base: str, *, labels: int = 1) -> Path:
    """A classifier that PEFT made and saved by itself."""
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj", "down_proj"])
    peft = get_peft_model(network, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    peft.save_pretrained(str(folder))
    return folder


def test_a_classifier_that_peft_made_is_a_reward_model_too(small_model: Path, tmp_path: Path):
    folder = save_by_peft(tmp_path / "adapter", str(small_model))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"classifier", "score"}
    model = load_model(Base(str(small_model), quantization="none", compute_dtype="float32"))
    rewarder = RewardModel.put_on(model, folder, ChatTokenizer(model.tokenizer))
    items = conversations(rewarder)
    expected = one_at_a_time(by_transformers(small_model, folder), items)
    assert flat(rewarder.rewards(items)) == pytest.approx(flat(expected), abs=1e-5)


# Where it is none's


def test_what_is_no_reward_model_is_refused_with_the_reason(small_model: Path, tmp_path: Path):
    model = load_model(Base(str(small_model), quantization="none", compute_dtype="float32"))
    chat = ChatTokenizer(model.tokenizer)
    two = save_by_peft(tmp_path / "two", str(small_model), labels=2)
    with pytest.raises(ModelError, match="a classifier of 2 labels"):
        RewardModel.put_on(model, two, chat)
    network = AutoModelForCausalLM.from_pretrained(str(small_model))
    plain = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    plain.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ModelError, match=r"is no reward model's \(CAUSAL_LM\)"):
        RewardModel.put_on(model, tmp_path / "plain", chat)


def test_a_reward_models_adapter_is_no_language_models(reward_recipe: Recipe, run: RunDirectory):
    recipe = dataclasses.replace(reward_recipe, base=load_recipe(run.recipe_file).base, loss=DPO())
    for wrong in (
        dataclasses.replace(recipe, adapter=Adapter(start_from=str(run.path))),
        dataclasses.replace(recipe, reference=Reference(adapter=str(run.path))),
    ):
        with pytest.raises(ModelError, match="trained for SEQ_CLS, as a reward model is"):
            train(wrong, quiet=True)


def test_it_is_exported_as_an_adapter_and_as_nothing_else(run: RunDirectory, tmp_path: Path):
    source = find_source(run.path)
    for kind in ("merged", "gguf", "gguf-adapter", "ollama"):
        with pytest.raises(RunError, match=f"so --to {kind} makes nothing of it: --to adapter does"):
            export(source, kind, tmp_path / kind)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError, match="nothing for --verify to compare"):
        export(source, "adapter", tmp_path / "verified", Options(verify=True))
    with pytest.raises(ModelError, match="trained for SEQ_CLS"):
        export_merged(source, tmp_path / "merged")
    folder = export(source, "adapter", tmp_path / "out")
    exported = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors_of(run).items())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    assert "implicit" not in card and "likelihood" not in card and "generate(" not in card
    rewarder = put_on(run)
    again = export(find_source(folder), "adapter", tmp_path / "again")  # a bare adapter's folder
    model = load_model(load_recipe(run.recipe_file).base)
    other = RewardModel.put_on(model, again, ChatTokenizer(model.tokenizer))
    assert other.fingerprint == rewarder.fingerprint
    items = conversations(rewarder)
    assert other.rewards(items) == rewarder.rewards(items)


def test_the_python_that_loads_an_exported_adapter_runs_from_any_folder(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    export(find_source(run.path), "adapter", Path("out"), display=Display())
    said = capsys.readouterr().out
    assert f"PeftModel.from_pretrained(base, {str(tmp_path / 'out')!r})" in said
    assert f"AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})" in said


# The command


@pytest.mark.parametrize(("loss", "kind"), [(BradleyTerry(), "adapter"), (DPO(), "merged")])
def test_train_advises_an_export_that_the_run_can_be(recipe: Recipe, tmp_path: Path, loss: Any, kind: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(dataclasses.replace(recipe, loss=loss)))
    done = CliRunner().invoke(app, ["train", str(file), "training.max_steps=1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"export:   lora-dpo export {recipe.run_directory} --to {kind}\n" in done.output


def test_the_command_trains_and_says_the_held_out_accuracy(recipe: Recipe, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    words = ["reward", "train", str(file), "loss.centering=0.01", "training.max_steps=2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "loss: BradleyTerry, in place of the recipe's DPO" in done.output
    assert "accuracy: " in done.output and "on 8 held-out pairs (mean with 95% bootstrap" in done.output
    assert f"lora-dpo export {recipe.run_directory} --to adapter" in done.output
    assert load_recipe(Path(recipe.run_directory) / "recipe.yaml").loss == BradleyTerry(centering=0.01)
    evaluated = CliRunner().invoke(app, ["eval", recipe.run_directory])
    assert evaluated.exit_code == 0 and "answers side by side" not in evaluated.output
