"""What leaves a run behaves elsewhere as it did here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pair_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from whole_merge import merged_weight

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError, RunError
from lora_dpo.evaluation import bootstrap
from lora_dpo.export import Options, Source, export, export_adapter, export_merged, find_source
from lora_dpo.finished import FinishedRun, evaluate_run, open_finished, side_by_side
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import load_base, without_dropout
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training, override
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import Display, train


@pytest.fixture(scope="module")
def trained(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    recipe = Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(folder / "pairs.jsonl"), eval_last=8),
        adapter=Adapter(rank=4, dropout=0.1),
        training=Training(pairs_per_step=8, epochs=20, max_steps=12, learning_rate=1e-2),
        run_directory=str(folder / "run"),
    )
    return train(recipe, quiet=True)


@pytest.fixture(scope="module")
def finished(trained: RunDirectory) -> FinishedRun:
    return open_finished(trained.path)


def logprobs(run: FinishedRun) -> torch.Tensor:
    items = run.data.eval
    with torch.no_grad(), without_dropout(run.model):
        return token_logprobs(run.model, collate(items, range(len(items))))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_adapter_loads_in_plain_peft_and_gives_the_same_log_probs(finished: FinishedRun, tmp_path: Path):
    folder = export_adapter(finished.directory, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == finished.recipe.base.model
    base = load_base(finished.recipe.base)
    base.set_attn_implementation("sdpa")
    plain = PeftModel.from_pretrained(base, str(folder))
    item = finished.data.eval[0]
    ids = torch.from_numpy(item.side(0)).long()
    at = torch.from_numpy(item.scored[0]).nonzero()[:, 0]
    with torch.no_grad():
        logits = plain(input_ids=ids[None]).logits[0].float()
    expected = logits.log_softmax(-1)[at - 1, ids[at]]
    ours = logprobs(finished)[: len(at)]
    assert (ours - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def source(trained: RunDirectory) -> Source:
    return find_source(trained.path)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_merged_model_reloaded_from_disk_behaves_as_base_and_adapter(
    source: Source, finished: FinishedRun, tmp_path: Path, dtype: str, bound: float
):
    report = export_merged(source, tmp_path / "merged", Options(dtype=dtype))  # pyright: ignore
    assert report.passed
    assert report.pairs is not None
    found = report.pairs.found
    assert found.tokens == sum(int(mask.sum()) for item in finished.data.eval for mask in item.scored)
    assert found.largest_difference < bound
    assert dtype != "float32" or found.top1 == 1
    assert (found.moved_kl or 0) > 20 * found.kl, "the adapter did too little for this to test anything"
    written = json.loads((tmp_path / "merged" / "export_report.json").read_text())
    assert written["pairs"]["logprob_difference"]["mean"] == found.difference
    assert written["weights"]["kept"] == pytest.approx(1, abs=0.05)


def test_the_merged_model_loads_in_plain_transformers_without_lora_dpo(source: Source, tmp_path: Path):
    folder = tmp_path / "merged"
    export_merged(source, folder, Options(verify=False))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'cat'}], add_generation_prompt=True"
        ", return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=5, do_sample=False)\n"
        "assert out.shape[1] > ids['input_ids'].shape[1]\n"
        "assert model.dtype == torch.bfloat16 and 'lora_dpo' not in sys.modules\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_a_merged_weight_is_what_the_layer_computes(small_model: Path, quantization: str):
    from builders import with_random_adapter

    from lora_dpo.model import load_model

    base = Base(str(small_model), quantization=quantization, compute_dtype="float32")  # pyright: ignore
    model = with_random_adapter(load_model(base, Adapter(rank=4)))
    for layer in model.adapter_layers:
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = layer(x)
        made = x @ merged_weight(layer).float().T
        # int8 also rounds its input, by 1/254 of the largest at most.
        assert (made - expected).norm() / expected.norm() < (0.03 if quantization == "int8" else 1e-5)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_export_does_not_overwrite(source: Source, tmp_path: Path, kind: Any):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="--output"):
        export(source, kind, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_what_misses_a_bar_is_not_exported_unless_it_is_accepted(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every update doubled on its way to the files: as wrong as a merge that adds it twice."""
    from lora_dpo.export.merging import merge as merging

    rounded = merging._rounded
    bent = lambda tensor, dtype, name: rounded(tensor * (1.02 if "_proj" in name else 1), dtype, name)  # noqa: E731
    monkeypatch.setattr(merging, "_rounded", bent)
    with pytest.raises(RunError, match=r"not exported, .*--accept"):
        export_merged(source, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert json.loads((tmp_path / ".merged.part" / "export_report.json").read_text())["passed"] is False
    report = export_merged(source, tmp_path / "merged", Options(accept=True))
    assert report.accepted
    assert json.loads((tmp_path / "merged" / "export_report.json").read_text())["accepted"] is True
    assert (
        "--accept" in (tmp_path / "merged" / "README.md").read_text()
        or "accept" in (tmp_path / "merged" / "README.md").read_text()
    )
    left = {file.name for file in (tmp_path / "merged").iterdir()}
    assert not {name for name in left if name.endswith((".part", ".kept.json")) or name == "merge.json"}


@pytest.mark.parametrize("how", ["alpha", "B"])
def test_an_adapter_that_changes_nothing_is_not_merged_unless_it_is_accepted(
    source: Source, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
):
    bare = export_adapter(source, tmp_path / "bare")
    if how == "alpha":
        config = json.loads((bare / "adapter_config.json").read_text())
        (bare / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    else:
        tensors = load_file(bare / "adapter_model.safetensors")
        tensors = {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}
        save_file(tensors, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="not exported"):
        export_merged(find_source(bare), tmp_path / "merged", Options(verify=False), display=Display())
    said = capsys.readouterr().out
    assert "MISSED: the adapter changes nothing" in said and "update kept" not in said
    accepted = Options(verify=False, accept=True)
    assert export_merged(find_source(bare), tmp_path / "merged", accepted).accepted
    told = json.loads((tmp_path / "merged" / "export_report.json").read_text())
    assert told["weights"]["kept"] is None and {layer["kept"] for layer in told["weights"]["layers"]} == {
        None
    }
    assert "changes no weight: its update is 0" in (tmp_path / "merged" / "README.md").read_text()


def test_an_adapters_folder_is_exported_without_its_run(source: Source, tmp_path: Path, small_model: Path):
    bare = tmp_path / "somebodys"
    export_adapter(source, bare)
    alone = find_source(bare)
    assert alone.base.quantization == source.base.quantization
    export_merged(alone, tmp_path / "a", Options(verify=False))
    export_merged(source, tmp_path / "b", Options(verify=False))
    same = "model.safetensors"
    assert (tmp_path / "a" / same).read_bytes() == (tmp_path / "b" / same).read_bytes()
    (bare / "trained_on.json").unlink()
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/where"}))
    with pytest.raises(ModelError, match=r"'some/where' as its base.* --base-model"):
        find_source(bare)
    assert find_source(bare, base_model=str(small_model)).base.quantization == "none"


def test_a_base_that_was_replaced_is_refused_with_both_hashes(
    source: Source, tmp_path: Path, small_model: Path
):
    other = tmp_path / "other"
    other.mkdir()
    for file in small_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert source.record is not None
    with pytest.raises(ModelError, match=f"another base.*{source.record.content}"):
        find_source(source.adapter, base_model=str(other))


def test_neither_a_run_nor_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="takes a run directory or an adapter's folder"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"there is no adapter_config\.json"):
        find_source(tmp_path)


def test_a_run_that_has_not_finished_has_nothing_to_export(tmp_path: Path, trained: RunDirectory):
    with pytest.raises(RunError, match="not a run directory"):
        open_finished(tmp_path)
    (tmp_path / "recipe.yaml").write_text(trained.recipe_file.read_text())
    with pytest.raises(RunError, match="no trained adapter"):
        open_finished(tmp_path)
    with pytest.raises(RunError, match="no trained adapter"):
        export_adapter(RunDirectory(tmp_path), tmp_path / "out")


def test_evaluation_reports_means_with_intervals_and_is_written(finished: FinishedRun):
    result = evaluate_run(finished)
    assert result.examples == 8
    accuracy = result.metrics["rewards/accuracy"]
    assert accuracy.low <= accuracy.mean <= accuracy.high
    written = json.loads(finished.directory.evaluation_file.read_text())
    assert written["metrics"]["rewards/margin"]["mean"] == result.means()["rewards/margin"]
    named = {
        "loss",
        "logps/accuracy",
        "logps/chosen_change",
        "logps/rejected_change",
        "tokens/chosen",
        "tokens/rejected",
    }
    assert named <= result.metrics.keys()


def test_evaluation_on_other_data(trained: RunDirectory, tmp_path: Path):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(5)))
    run = open_finished(trained.path, data=str(tmp_path / "other.jsonl"))
    assert evaluate_run(run).examples == 5


def test_side_by_side_answers_are_what_plain_greedy_generation_gives(finished: FinishedRun):
    """Batched and padded, base and policy, against one prompt at a time through plain generate."""
    samples = side_by_side(finished, count=4, max_new_tokens=8)
    assert len(samples) == 4
    assert any(sample.base != sample.policy for sample in samples)
    lines = [json.loads(line) for line in finished.directory.samples_file.read_text().splitlines()]
    assert [line["policy"] for line in lines] == [sample.policy for sample in samples]
    record = finished.data.records[0]
    ids = torch.from_numpy(finished.data.tokenizer.prompt_ids(record.prompt)).long()[None]
    causal = finished.model.causal
    causal.set_attn_implementation("sdpa")
    with without_dropout(finished.model):
        made = causal.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
        )
    causal.set_attn_implementation("lora_dpo_branches")
    text = finished.data.tokenizer.decode(made[0, ids.shape[1] :].tolist())
    assert samples[0].policy == text


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_more_rows():
    generator = torch.Generator().manual_seed(0)
    few = bootstrap(torch.randn(20, generator=generator))
    many = bootstrap(torch.randn(2000, generator=generator))
    assert few.low < few.mean < few.high
    # 1.96 standard errors of a unit normal either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.15)
    assert few.high - few.low > 4 * (many.high - many.low)
    assert bootstrap(torch.ones(5)) == bootstrap(torch.ones(9))


def test_overrides_reach_an_opened_run(trained: RunDirectory):
    run = open_finished(trained.path, overrides=["data.max_eval_rows=3"])
    assert len(run.data.eval) == 3
    assert override(run.recipe, ["data.max_eval_rows=null"]).data.max_eval_rows is None


def test_a_quantized_gpt2_merges_into_its_transposed_layers(tmp_path: Path):
    from builders import pair_rows, small_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    small_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    recipe = Recipe(
        base=Base(str(tmp_path / "gpt2"), compute_dtype="float32"),
        data=Data(str(tmp_path / "pairs.jsonl"), eval_last=4),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=8, epochs=9, max_steps=6, learning_rate=1e-2),
        run_directory=str(tmp_path / "run"),
    )
    report = export_merged(
        find_source(train(recipe, quiet=True).path), tmp_path / "merged", Options(dtype="float32")
    )
    assert report.pairs is not None
    assert report.pairs.found.largest_difference < 1e-4
    assert (report.pairs.found.moved_kl or 0) > 1e-4
