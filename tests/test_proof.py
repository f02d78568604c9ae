"""What the proof of an export says is what plain forward passes say, and a damaged export misses the bars."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as quantized
import numpy as np
import pytest
import torch
from builders import SHARED, pair_rows, random_branches
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole_merge import merged_network

from lora_dpo.errors import DataError
from lora_dpo.evaluation import Interval
from lora_dpo.export import Options, export_adapter, find_source
from lora_dpo.export import export_merged as export_and_prove
from lora_dpo.export.proof import arithmetic
from lora_dpo.export.proof import prove as proof
from lora_dpo.export.proof.arithmetic import NoRoom, Plan, in_float32, parameters_in, plan
from lora_dpo.export.proof.bars import EXACT, bars_for, missed
from lora_dpo.export.proof.comparing import Comparison, compare, margins_of, share_kept
from lora_dpo.export.proof.prove import prove
from lora_dpo.export.proof.report import Pairs, Report, describe
from lora_dpo.export.proof.said import Said, listen, spread
from lora_dpo.finished import FinishedRun, open_finished
from lora_dpo.losses import KTO
from lora_dpo.model import as_base, dequantized, load_adapter, load_model
from lora_dpo.preferences import Where
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.run_directory import RunDirectory
from lora_dpo.tokenization import Branches
from lora_dpo.training import train


@dataclass(frozen=True)
class Source:
    """What is exported, as `export.source.Source` describes it."""

    adapter: Path
    base: Base
    run: RunDirectory | None = None
    recipe: Recipe | None = None
    record: Any = None


def source_of(run: FinishedRun) -> Source:
    return Source(run.directory.adapter_folder, run.recipe.base, run.directory, run.recipe)


def export_merged(run: FinishedRun, to: Path, *, dtype: str) -> Path:
    """The model as it is in memory, merged whole: the proof is of any folder, whoever made it."""
    merged_network(run.model, run.recipe.base, getattr(torch, dtype)).save_pretrained(to)
    run.data.tokenizer.save(to)
    return to


def streamed(run: FinishedRun, to: Path, *, dtype: Any) -> Path:
    """The run merged as the command does it, not yet compared."""
    export_and_prove(find_source(run.directory.path), to, Options(dtype=dtype, verify=False, accept=True))
    return to


@pytest.fixture(scope="module")
def finished(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Twelve steps on an NF4 base in bfloat16, eight pairs held out."""
    folder = tmp_path_factory.mktemp("proof")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    recipe = Recipe(
        base=Base(str(small_model), compute_dtype="bfloat16"),
        data=Data(str(folder / "pairs.jsonl"), eval_last=8),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=8, epochs=20, max_steps=12, learning_rate=3e-3),
        run_directory=str(folder / "run"),
    )
    return open_finished(train(recipe, quiet=True).path)


@pytest.fixture(scope="module")
def exact(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_merged(finished, tmp_path_factory.mktemp("exact") / "merged", dtype="float32")


# The plain way: whole float32 models of transformers and peft, one sequence at a time.


def plain_base(folder: str) -> Any:
    """The base with its linear layers quantized to NF4 and back in bfloat16, then computing in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantized.quantize_4bit(
                module.weight.data.bfloat16(), quant_type="nf4", compress_statistics=True
            )
            module.weight.data = quantized.dequantize_4bit(packed, state).float()
    return model


def distributions(model: Any, item: Branches, side: int) -> tuple[Tensor, Tensor]:
    """Log-distributions that predict the scored tokens of a side [n, V], and these tokens [n]."""
    ids = torch.from_numpy(item.side(side).astype(np.int64))
    at = torch.from_numpy(np.flatnonzero(item.scored[side]))
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[at - 1], ids[at]


def plain_sums(model: Any, items: list[Branches]) -> Tensor:
    """Summed log-probs of each side, [B, 2]."""
    sums = []
    for item in items:
        for side in range(item.sides):
            rows, targets = distributions(model, item, side)
            sums.append(rows[torch.arange(len(targets)), targets].sum())
    return torch.stack(sums).view(len(items), -1)


@dataclass(frozen=True)
class Plain:
    """Mean margins over the quantized base, and the models."""

    trained: float
    exported: float
    models: tuple[Any, Any]


def plainly(source: Source, folder: Path, items: list[Branches], model: Any = None) -> Plain:
    peft = PeftModel.from_pretrained(model or plain_base(source.base.model), str(source.adapter))
    merged = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with peft.disable_adapter():
        base = plain_sums(peft, items)
    means = [(plain_sums(m, items) - base).mean(dim=0) for m in (peft, merged)]
    return Plain(*(float(mean[0] - mean[1]) for mean in means), models=(peft, merged))


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_the_margin_kept_is_that_of_plain_forward_passes(finished: FinishedRun, tmp_path: Path):
    folder = export_merged(finished, tmp_path / "merged", dtype="bfloat16")
    report = prove(source_of(finished), folder, dtype="bfloat16")
    plain = plainly(source_of(finished), folder, finished.data.eval)
    assert report.pairs is not None and report.pairs.arithmetic == "float32"
    found = report.pairs.found
    assert abs(plain.trained) > 0.1, "the adapter did too little for this to test anything"
    assert found.kept is not None
    assert found.kept.mean == pytest.approx(plain.exported / plain.trained, abs=1e-3)
    assert found.margin[0].mean == pytest.approx(plain.trained, abs=1e-4)
    assert found.margin[1].mean == pytest.approx(plain.exported, abs=1e-4)


def test_differences_are_those_of_plain_forward_passes(finished: FinishedRun, tmp_path: Path):
    """|Δ log-prob|, KL and the likeliest tokens, at every scored token: there are fewer than positions."""
    folder = export_merged(finished, tmp_path / "merged", dtype="bfloat16")
    report = prove(source_of(finished), folder, dtype="bfloat16")
    items = finished.data.eval
    trained, merged = plainly(source_of(finished), folder, items).models
    gaps, kl, same = [], [], []
    for item in items:
        for side in (0, 1):
            (p, targets), (q, _) = (distributions(model, item, side) for model in (trained, merged))
            gaps.append((p - q)[torch.arange(len(targets)), targets].abs())
            kl.append((p.exp() * (p - q)).sum(dim=-1))
            same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
    assert report.pairs is not None
    found = report.pairs.found
    assert found.tokens == found.positions == len(torch.cat(kl))
    assert found.difference == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-2)
    assert found.largest_difference == pytest.approx(torch.cat(gaps).max().item(), rel=1e-2)
    assert found.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-2, abs=1e-7)
    assert found.largest_kl == pytest.approx(torch.cat(kl).max().item(), rel=1e-2, abs=1e-6)
    assert found.top1 == pytest.approx(torch.cat(same).double().mean().item(), abs=1.5 / found.tokens)


def test_a_float32_merge_is_what_was_trained(finished: FinishedRun, exact: Path):
    report = prove(source_of(finished), exact, dtype="float32", weights=WHOLE)
    assert report.passed is True and report.failed == []
    assert report.pairs is not None
    found = report.pairs.found
    assert found.largest_difference < 1e-4
    assert found.top1 == 1.0
    assert found.kept is not None and found.kept.mean == pytest.approx(1.0, abs=1e-4)
    assert found.accuracy is not None and found.accuracy[0] == found.accuracy[1]
    assert found.moved_kl is not None and found.moved_kl > 100 * found.kl


WHOLE = {"kept": 1.0, "error": 0.0, "layers": [{"name": "q", "update": 0.1, "kept": 1.0, "error": 0.0}]}


def zeroed(tensors: dict[str, Tensor], update: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()


def left_out(tensors: dict[str, Tensor], update: dict[str, Tensor]) -> None:
    for name, tensor in update.items():
        tensors[name] -= tensor


def added_twice(tensors: dict[str, Tensor], update: dict[str, Tensor]) -> None:
    for name, tensor in update.items():
        tensors[name] += tensor


def one_layer_left_out(tensors: dict[str, Tensor], update: dict[str, Tensor]) -> None:
    for name, tensor in update.items():
        if ".layers.1." in name:
            tensors[name] -= tensor


@pytest.mark.parametrize("damage", [zeroed, left_out, added_twice, one_layer_left_out])
def test_a_damaged_export_misses_the_bars(
    finished: FinishedRun, exact: Path, tmp_path: Path, damage: Callable[..., None]
):
    folder = tmp_path / "damaged"
    shutil.copytree(exact, folder)
    tensors = load_file(folder / "model.safetensors")
    layers: dict[str, Any] = {
        f"{name}.weight": layer
        for name, layer in finished.model.causal.named_modules()
        if layer in finished.model.adapter_layers
    }
    update = {
        name: tensors[name] - dequantized(layer.get_base_layer()).float() for name, layer in layers.items()
    }
    assert len(update) == 14 and all(tensor.norm() > 0 for tensor in update.values())
    damage(tensors, update)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = prove(source_of(finished), folder, dtype="float32")
    assert report.passed is False
    written = json.loads((folder / "export_report.json").read_text())
    assert written["failed"] == report.failed and written["passed"] is False
    assert any("--accept" in line for line in describe(report))


def test_both_bases_stand_side_by_side(finished: FinishedRun, tmp_path: Path):
    source, items = source_of(finished), finished.data.eval
    plain_base_too = dataclasses.replace(source.base, quantization="none", compute_dtype="float32")
    on_original = load_adapter(load_model(plain_base_too), str(source.adapter))
    run = dataclasses.replace(finished, model=on_original)
    folder = export_merged(run, tmp_path / "merged", dtype="float32")
    report = prove(source, folder, dtype="float32", base="original")
    original = AutoModelForCausalLM.from_pretrained(source.base.model, dtype=torch.float32)
    own = plainly(source, folder, items, original)
    over_quantized = plainly(source, folder, items)
    trained, exported = report.bases
    assert trained.margin.mean == pytest.approx(over_quantized.trained, abs=1e-4)
    assert exported.margin.mean == pytest.approx(own.exported, abs=1e-4)
    assert exported.margin_over_quantized.mean == pytest.approx(over_quantized.exported, abs=1e-4)
    assert trained.margin_over_quantized == trained.margin
    assert abs(own.exported - over_quantized.exported) > 1e-3, "the two references say the same"
    merged = over_quantized.models[1]
    for side, mean in ((0, exported.logps_chosen), (1, exported.logps_rejected)):
        tokens = [distributions(merged, item, side) for item in items]
        plain = torch.cat([rows[torch.arange(len(ids)), ids] for rows, ids in tokens]).mean().item()
        assert mean == pytest.approx(plain, abs=1e-5)
    # The bars are for what the weights were to be: the original base with the adapter.
    assert report.passed is True and report.stored is not None
    assert report.stored.found.largest_difference < 1e-4
    assert report.pairs is not None and report.pairs.found.difference > 1e-3
    assert [one["name"] for one in report.as_dict()["bases"]] == [trained.name, exported.name]


def test_an_exported_adapter_is_the_same_to_the_bit(finished: FinishedRun, tmp_path: Path):
    folder = export_adapter(finished.directory, tmp_path / "adapter")
    report = prove(source_of(finished), folder, dtype="float32", kind="adapter")
    assert report.passed is True and report.pairs is not None
    assert report.pairs.found.largest_difference == 0.0
    assert report.pairs.arithmetic == "bfloat16"


@pytest.mark.parametrize("kind", ["gguf", "gguf-adapter", "ollama"])
def test_files_that_are_not_run_here_are_not_compared(finished: FinishedRun, tmp_path: Path, kind: Any):
    report = prove(source_of(finished), tmp_path, dtype="float32", kind=kind, weights=WHOLE)
    assert report.passed is None and report.pairs is None and kind in str(report.not_compared)
    assert json.loads((tmp_path / "export_report.json").read_text())["passed"] is None


def test_a_bare_adapter_is_compared_on_rows_that_are_given(
    finished: FinishedRun, exact: Path, tmp_path: Path
):
    bare = dataclasses.replace(source_of(finished), run=None, recipe=None)
    report = prove(bare, tmp_path, dtype="float32")
    assert report.passed is None and "--data" in str(report.not_compared)
    rows = tmp_path / "others.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(48)[40:]))
    report = prove(bare, exact, dtype="float32", data=str(rows), examples=5)
    assert report.passed is True and report.pairs is not None
    assert report.pairs.found.examples == 5 and report.pairs.source == str(rows)


def test_rows_that_moved_are_said_and_named_rows_must_be_there(
    finished: FinishedRun, exact: Path, tmp_path: Path
):
    gone = dataclasses.replace(finished.recipe, data=Data(str(tmp_path / "gone.jsonl"), eval_last=8))
    moved = dataclasses.replace(source_of(finished), recipe=gone)
    report = prove(moved, tmp_path, dtype="float32")
    assert report.passed is None and "gone.jsonl" in str(report.not_compared)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        prove(source_of(finished), exact, dtype="float32", data=str(tmp_path / "nowhere.jsonl"))


def test_without_room_nothing_is_compared_and_the_bytes_are_said(
    finished: FinishedRun, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parameters, stored = parameters_in(exact)
    assert parameters == sum(tensor.numel() for tensor in load_file(exact / "model.safetensors").values())
    assert stored == 4 * parameters
    folder = tmp_path / "merged"
    shutil.copytree(exact, folder)
    monkeypatch.setattr(arithmetic, "free_bytes", lambda kind: stored)  # a tenth is to be spared
    report = prove(source_of(finished), folder, dtype="float32", weights=WHOLE)
    assert report.passed is None and report.pairs is None
    assert "GB of memory" in str(report.not_compared) and "free on the CPU" in str(report.not_compared)


def test_where_float32_does_not_fit_the_stored_dtype_is_compared_in(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = export_merged(finished, tmp_path / "merged", dtype="bfloat16")
    parameters, stored = parameters_in(folder)
    assert stored == 2 * parameters
    monkeypatch.setattr(arithmetic, "free_bytes", lambda kind: 3 * parameters)
    report = prove(source_of(finished), folder, dtype="bfloat16")
    assert report.pairs is not None
    assert report.pairs.arithmetic == "bfloat16" and not report.pairs.exact
    assert report.bars == bars_for(compared=True, exact=False)
    assert any("coarse" in note for note in report.notes)


def test_a_card_without_room_leaves_it_to_the_cpu_and_a_large_model_to_fewer_examples(
    exact: Path, monkeypatch: pytest.MonkeyPatch
):
    base, tokens = Base("model", device="auto"), [100] * 64
    monkeypatch.setattr(arithmetic, "device_of", lambda base: torch.device("cuda"))
    parameters = parameters_in(exact)[0]
    free = {"cuda": 5 * parameters, "cpu": 5 * parameters}
    monkeypatch.setattr(arithmetic, "free_bytes", lambda kind: free[kind])
    assert plan(exact, base, "float32", tokens) == Plan("cuda", "float32", 64)
    free["cuda"] = parameters
    assert plan(exact, base, "float32", tokens) == Plan("cpu", "float32", 64)
    monkeypatch.setattr(arithmetic, "CPU_PRODUCTS", 6.0 * parameters * 100 * 10)
    made = plan(exact, base, "float32", tokens)
    assert isinstance(made, Plan) and made.examples == 10 and "10 of 64" in made.said
    free["cpu"] = parameters
    refused = plan(exact, base, "float32", tokens)
    assert isinstance(refused, NoRoom) and "the card" in refused.said and "the CPU" in refused.said


def test_a_run_of_a_card_is_compared_where_there_is_none(
    finished: FinishedRun, exact: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its compute dtype is the one on record, whatever this machine would take."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = source_of(finished)
    card = dataclasses.replace(source.base, device="cuda", compute_dtype="auto")
    recorded = dataclasses.replace(source, base=card, record=SimpleNamespace(compute_dtype="bfloat16"))
    assert prove(recorded, exact, dtype="float32").passed is True


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_leaves_a_report_that_says_so(
    finished: FinishedRun, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fails(*arguments: Any) -> Any:
        raise error

    shutil.copytree(exact, tmp_path / "merged")
    monkeypatch.setattr(proof, "load_adapter", fails)
    report = prove(source_of(finished), tmp_path / "merged", dtype="float32", weights=WHOLE)
    assert report.passed is None and "memory ran out" in str(report.not_compared)


def test_float32_arithmetic_keeps_the_weights_as_the_compute_dtype_rounds_them(small_model: Path):
    base = Base(str(small_model), compute_dtype="bfloat16")
    model = in_float32(load_model(base))
    layer: Any = model.causal.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.quant_state.dtype == torch.bfloat16
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = quantized.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(layer(x), x @ weight.float().T)
    plain = [p for name, p in model.causal.named_parameters() if not name.endswith("_proj.weight")]
    assert plain and all(p.dtype == torch.float32 for p in plain)


KINDS = {
    "plain": {},
    "scaled by its rank": {"rslora": True},
    "DoRA": {"dora": True},
    "PiSSA": {"init": "pissa"},
    "trained tokens": {"trained_tokens": ("<|im_end|>",)},
    "a whole head": {"modules_to_save": ("lm_head",)},
    "whole embeddings": {"modules_to_save": ("embed_tokens",)},
    "a whole norm": {"modules_to_save": ("norm",)},
    "a head": {"targets": ("q_proj", "lm_head")},
}


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((kind, "nf4") for kind in KINDS), *(("plain", other) for other in ("fp4", "int8", "none"))],
)
def test_in_float32_arithmetic_every_adapter_is_its_float32_merge(
    finished: FinishedRun, tmp_path: Path, kind: str, quantization: str
):
    base = dataclasses.replace(finished.recipe.base, quantization=quantization)
    model = load_model(base, Adapter(rank=4, **KINDS[kind]))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trainable.values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    items = finished.data.eval[:3]
    run = dataclasses.replace(finished, model=model)
    folder = export_merged(run, tmp_path / "merged", dtype="float32")
    with as_base(model):
        untrained = listen(model, items)
    trained = listen(in_float32(model), items)
    merged = listen(load_model(Base(str(folder), quantization="none", compute_dtype="float32")), items)
    assert (trained.tokens - untrained.tokens).abs().max() > 0.01
    assert (trained.tokens - merged.tokens).abs().max() < 1e-4


def test_what_a_model_says_does_not_depend_on_the_micro_batches(finished: FinishedRun):
    model = in_float32(open_finished(finished.directory.path).model)
    rng = np.random.default_rng(0)  # of growing size: they are packed longest first
    items = [random_branches(rng, 5 + n, [3 + n, 9 - n // 2], row=n + 1) for n in range(6)]
    one = listen(model, items, positions=20, tokens_per_microbatch=10_000)
    other = listen(model, items, positions=20, tokens_per_microbatch=1)
    assert torch.equal(one.positions, other.positions) and len(one.positions) == 20
    assert (one.tokens - other.tokens).abs().max() < 1e-5
    assert (one.sums - other.sums).abs().max() < 1e-4
    assert (one.distributions - other.distributions).abs().max() < 1e-5
    # Positions count scored tokens as `tokens` does.
    targets = torch.cat(
        [torch.from_numpy(item.side(n)[item.scored[n]]).long() for item in items for n in (0, 1)]
    )[one.positions]
    assert (one.distributions[torch.arange(20), targets] - one.tokens[one.positions]).abs().max() < 1e-5


@pytest.mark.parametrize(("count", "out_of"), [(5, 5), (3, 10), (10, 3), (1, 1), (0, 7), (4, 0), (99, 100)])
def test_spread_numbers_are_different_and_even(count: int, out_of: int):
    found = spread(count, out_of)
    assert len(found) == min(count, out_of) == len(set(found))
    assert found == sorted(found) and all(0 <= n < out_of for n in found)
    if len(found) > 1:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1


def said(sums: list[list[float]]) -> Said:
    return Said(torch.tensor([0.0]), torch.tensor(sums, dtype=torch.float64), torch.tensor([0]), UNIFORM)


UNIFORM = torch.full((1, 2), 0.5).log()


def example(desirable: float = 1.0) -> Branches:
    mask = np.array([False, True])
    return Branches(
        np.array([1], np.int32),
        (np.array([2], np.int32),),
        (mask,),
        Where("here", 1),
        {"desirable": desirable},
    )


def test_the_margin_of_a_rating_turns_with_it_and_that_of_a_demonstration_is_its_log_ratio():
    trained, base = said([[-3.0], [-7.0]]), said([[-5.0], [-4.0]])
    rows = [example(1.0), example(0.0)]
    assert margins_of(trained, base, rows, "ratings").tolist() == [2.0, 3.0]
    assert margins_of(trained, base, rows, "demonstrations").tolist() == [2.0, -3.0]
    found = compare(trained, base, trained, rows, "ratings")
    assert found.accuracy is None and "rating" in found.of
    assert found.margin[0].mean == 2.5 and found.kept is not None and found.kept.mean == 1.0


def test_ratings_are_compared_by_their_own_responses(finished: FinishedRun, exact: Path):
    rated = dataclasses.replace(finished.recipe, loss=KTO())
    report = prove(dataclasses.replace(source_of(finished), recipe=rated), exact, dtype="float32")
    assert report.passed is True and report.pairs is not None
    assert report.pairs.found.accuracy is None
    assert report.as_dict()["pairs"]["preference_accuracy"] is None


def test_the_share_kept_resamples_both_margins_of_an_example_together():
    trained = torch.tensor([5.0, -4.0, 2.0, 0.5], dtype=torch.float64)
    kept = share_kept(trained, 0.7 * trained)
    assert kept is not None
    assert (kept.mean, kept.low, kept.high) == pytest.approx((0.7, 0.7, 0.7))
    assert share_kept(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) is None


def comparison(**changes: Any) -> Comparison:
    one = Interval(1.0, 0.9, 1.1)
    values: dict[str, Any] = {
        "examples": 8, "tokens": 100, "positions": 100, "difference": 0.0, "largest_difference": 0.0,
        "kl": 0.0, "largest_kl": 0.0, "top1": 1.0, "moved_kl": 1e-2, "of": "", "accuracy": (one, one),
        "margin": (one, one), "kept": Interval(1.0, 1.0, 1.0),
    }  # fmt: skip
    return Comparison(**values | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": Interval(0.72, 0.70, 0.73)}, "margin kept"),
        ({"kept": Interval(1.2, 1.1, 1.3)}, "margin kept"),
        ({"kept": Interval(float("nan"), float("nan"), float("nan"))}, "margin kept"),
        ({"top1": 0.979}, "top-1"),
        ({"top1": 0.9, "positions": 20}, "top-1"),
        ({"top1": float("nan")}, "top-1"),
        ({"kl": 6e-4}, "KL"),
        ({"kl": float("nan")}, "KL"),
        # Few pairs or positions alone, or rounding where training hardly moved the model, miss nothing.
        ({"top1": 0.95, "positions": 20}, None),
        ({"kept": Interval(0.8, 0.5, 1.3)}, None),
        ({"kept": None}, None),
        ({"kl": 4e-4}, None),
        ({"kl": 9e-7, "moved_kl": 1e-6}, None),
    ],
)
def test_each_bar_is_missed_by_itself(changes: dict[str, Any], words: str | None):
    lines = missed(bars_for(compared=True), WHOLE, comparison(**changes))
    assert len(lines) == (words is not None) and all(words in line for line in lines if words)


def test_weights_that_lost_the_update_fail_without_pairs_too():
    report = Report("merged", "bfloat16", weights=WHOLE | {"kept": 0.53}, not_compared="no rows")
    assert report.passed is False and "0.53" in report.failed[0]
    assert not report.accepted and dataclasses.replace(report, accept=True).accepted
    assert any("--dtype float16" in line for line in describe(report))


def test_an_export_onto_the_original_base_is_not_called_what_was_trained():
    pairs = Pairs("rows", "float32", comparison())
    report = Report("merged", "float32", "original", weights=WHOLE, pairs=pairs, stored=pairs)
    assert report.passed and "another function than the one that was trained" in describe(report)[-1]


def test_what_was_not_compared_is_called_neither_passed_nor_failed():
    lines = describe(Report("merged", "float32", weights=WHOLE, not_compared="the run has no held-out rows"))
    assert lines[-1].startswith("neither passed nor failed: only the weights were measured")


def test_the_report_has_the_keys_that_others_read(finished: FinishedRun, exact: Path, tmp_path: Path):
    folder = tmp_path / "merged"
    shutil.copytree(exact, folder)
    report = prove(source_of(finished), folder, dtype="float32", weights=WHOLE)
    written = json.loads((folder / "export_report.json").read_text())
    assert written["format"] == 1 and written["kind"] == "merged" and written["base"] == "dequantized"
    assert written["passed"] is True and written["failed"] == [] and written["accepted"] is False
    assert written["bars"].keys() == {*EXACT, "update_kept"}
    assert written["weights"] == WHOLE and written["bases"] is None
    pairs = written["pairs"]
    assert pairs["examples"] == 8 and pairs["logprob_difference"].keys() == {"mean", "largest"}
    assert {"mean", "largest"} <= pairs["kl"].keys()
    for name in ("preference_accuracy", "margin"):
        for model in ("trained", "exported"):
            assert pairs[name][model].keys() == {"mean", "low", "high"}
    assert pairs["margin"]["kept"] == pytest.approx(1.0, abs=1e-4)
    assert describe(report)[-1].startswith("passed")


CHAT = SHARED / "models" / "chat-10m"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    """The small chat model after a few steps at one of DPO's rates."""
    if not CHAT.is_dir():
        pytest.skip("needs ../shared")
    folder = tmp_path_factory.mktemp("chat")
    recipe = Recipe(
        base=Base(str(CHAT), compute_dtype="bfloat16", device="cpu"),
        data=Data(str(SHARED / "data" / "politeness_900.json"), max_rows=64, eval_last=12, on_bad_row="skip"),
        training=Training(
            pairs_per_step=8, max_steps=6, learning_rate=2e-5, gradient_checkpointing="none", warmup=0.0
        ),
        run_directory=str(folder / "run"),
    )
    yield open_finished(train(recipe, quiet=True).path)


def test_the_margin_kept_at_dpos_rates_is_that_of_plain_forward_passes(chat: FinishedRun, tmp_path: Path):
    folder = streamed(chat, tmp_path / "merged", dtype="bfloat16")
    report = prove(source_of(chat), folder, dtype="bfloat16")
    plain = plainly(source_of(chat), folder, chat.data.eval)
    assert report.pairs is not None and report.pairs.found.kept is not None
    assert report.pairs.found.kept.mean == pytest.approx(plain.exported / plain.trained, abs=1e-3)
    assert plain.exported / plain.trained < 0.95, "bfloat16 keeps this update: the test shows too little"
    assert report.passed is False
    half = streamed(chat, tmp_path / "half", dtype="float16")
    assert prove(source_of(chat), half, dtype="float16").passed is True
