"""What leaves a run behaves elsewhere as it did here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import pair_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError, RunError
from lora_dpo.evaluation import bootstrap
from lora_dpo.export import export_adapter, export_merged, merged_weight, verify_merged
from lora_dpo.finished import FinishedRun, evaluate_run, open_finished, side_by_side
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import load_base, without_dropout
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training, override
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import train


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


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_the_merged_model_reloaded_from_disk_behaves_as_base_and_adapter(
    finished: FinishedRun, tmp_path: Path, dtype: str, bound: float
):
    folder = export_merged(finished, tmp_path / "merged", dtype=dtype)  # pyright: ignore
    gap = verify_merged(finished, folder, dtype=dtype)  # pyright: ignore
    assert gap is not None
    assert gap.tokens == sum(int(mask.sum()) for item in finished.data.eval for mask in item.scored)
    assert gap.largest < bound
    assert gap.update > 20 * gap.mean, "the adapter did too little for this to test anything"
    assert json.loads((folder / "export_report.json").read_text())["mean"] == gap.mean


def test_the_merged_model_loads_in_plain_transformers_without_lora_dpo(finished: FinishedRun, tmp_path: Path):
    folder = export_merged(finished, tmp_path / "merged")
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


def test_every_tensor_of_the_base_is_in_the_merged_model(
    finished: FinishedRun, small_model: Path, tmp_path: Path
):
    folder = export_merged(finished, tmp_path / "merged", dtype="float32")
    original = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert original.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        layer = finished.model.causal.get_submodule(name.removesuffix(".weight"))
        expected = merged_weight(layer).float() if "_proj" in name else original.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template is not None


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


def test_a_weight_that_overflows_float16_is_refused(finished: FinishedRun, tmp_path: Path):
    norm = finished.model.causal.model.norm.weight
    kept = norm.detach().clone()
    try:
        norm.data[0] = 1e6
        with pytest.raises(ModelError, match=r"norm.weight does not fit float16"):
            export_merged(finished, tmp_path / "half", dtype="float16")
    finally:
        norm.data.copy_(kept)
    assert not (tmp_path / "half").exists()


def test_an_export_does_not_overwrite(finished: FinishedRun, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for export in (export_adapter, export_merged):
        with pytest.raises(RunError, match="--output"):
            export(finished.directory if export is export_adapter else finished, tmp_path)  # pyright: ignore
    assert (tmp_path / "notes.txt").read_text() == "mine"


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
    run = open_finished(train(recipe, quiet=True).path)
    gap = verify_merged(run, export_merged(run, tmp_path / "merged", dtype="float32"), dtype="float32")
    assert gap is not None
    assert gap.largest < 1e-3 < gap.update
