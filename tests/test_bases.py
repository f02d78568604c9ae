"""Bases as people have them: quantized before, in shards, at a revision; and what of them isn't quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from builders import build, pair_rows, random_branches, save_small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.export import Options, export_merged, find_source
from lora_dpo.losses import DPO
from lora_dpo.model import Model, load_base, load_model
from lora_dpo.model.base import unquantized_bytes
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.reference import base_fingerprint, reference_logprobs
from lora_dpo.training import train
from lora_dpo.training.start import describe_kept

QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def save_quantized(folder: Path, original: Path, **options: Any) -> Path:
    """What `save_pretrained` makes of a model that bitsandbytes quantized."""
    config = BitsAndBytesConfig(**options)
    network = AutoModelForCausalLM.from_pretrained(
        str(original), quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    network.save_pretrained(str(folder))
    for file in original.glob("*token*"):
        shutil.copy(file, folder)
    for file in original.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def quantized(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    return {name: save_quantized(folder / name, small_model, **given) for name, given in QUANTIZED.items()}


def logprobs_of(base: Base, adapter: Adapter | None = None) -> tuple[Model, Tensor]:
    model = load_model(base, adapter)
    return model, reference_logprobs(model, batch())


def batch():
    rng = np.random.default_rng(0)
    items = [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(4)]
    return collate(items, range(len(items)))


# ---- quantized before


@pytest.mark.parametrize("quantization", list(QUANTIZED))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_bitsandbytes_quantized_is_the_same_base_as_one_quantized_while_loading(
    small_model: Path, quantized: dict[str, Path], quantization: str, dtype: str
):
    given: dict[str, Any] = {"quantization": quantization, "compute_dtype": dtype}
    fresh, expected = logprobs_of(Base(str(small_model), **given))
    stored, found = logprobs_of(Base(str(quantized[quantization]), **given))
    assert base_fingerprint(stored) == base_fingerprint(fresh), "every byte, scales included"
    assert torch.equal(found, expected)
    assert stored.compute_dtype == getattr(torch, dtype), "the recipe's, not the one that was saved"


@pytest.mark.parametrize("quantization", list(QUANTIZED))
def test_an_untrained_policy_on_it_is_its_reference_to_the_bit(quantized: dict[str, Path], quantization: str):
    base = Base(str(quantized[quantization]), quantization=quantization, compute_dtype="bfloat16")  # pyright: ignore
    ratio = batch_logprobs(load_model(base, Adapter(rank=4)), DPO(), batch()).log_ratio
    assert torch.equal(ratio, torch.zeros_like(ratio))


@pytest.mark.parametrize(
    ("stored", "given", "words"),
    [
        ("nf4", {"quantization": "none"}, r"stored as nf4.*set base\.quantization=nf4 \(it is none\)"),
        ("nf4", {"quantization": "int8"}, r"stored as nf4"),
        ("fp4", {}, r"stored as fp4.*set base\.quantization=fp4 \(it is nf4\)"),
        ("int8", {}, r"stored as int8.*set base\.quantization=int8"),
        (
            "nf4",
            {"double_quantization": False},
            r"with double quantization: set base\.double_quantization=true",
        ),
    ],
)
def test_a_recipe_that_says_otherwise_is_refused(
    quantized: dict[str, Path], stored: str, given: dict[str, Any], words: str
):
    with pytest.raises(ModelError, match=words):
        load_model(Base(str(quantized[stored]), **given))


def test_one_without_double_quantization_is_taken_where_the_recipe_says_so(small_model: Path, tmp_path: Path):
    folder = save_quantized(tmp_path / "q", small_model, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ModelError, match=r"without double quantization: set base\.double_quantization=false"):
        load_model(Base(str(folder)))
    given: dict[str, Any] = {"double_quantization": False, "compute_dtype": "float32"}
    _, found = logprobs_of(Base(str(folder), **given))
    _, expected = logprobs_of(Base(str(small_model), **given))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq", "torchao"])
def test_other_quantizations_are_refused_with_what_to_use_instead(
    small_model: Path, tmp_path: Path, method: str
):
    folder = shutil.copytree(small_model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"quantized with {method}.*16-bit copy.*or one quantized by"):
        load_model(Base(str(folder)))


def test_a_run_on_a_quantized_checkpoint_trains_and_merges(quantized: dict[str, Path], tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    recipe = Recipe(
        base=Base(str(quantized["nf4"]), compute_dtype="float32"),
        data=Data(str(tmp_path / "pairs.jsonl"), eval_last=4),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=8, epochs=9, max_steps=6, learning_rate=1e-2),
        run_directory=str(tmp_path / "run"),
    )
    source, folder = find_source(train(recipe, quiet=True).path), tmp_path / "merged"
    report = export_merged(source, folder, Options(dtype="float32"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert report.passed
    assert report.pairs is not None
    assert report.pairs.found.largest_difference < 1e-4
    assert (report.pairs.found.moved_kl or 0) > 1e-4, "the adapter did too little for this to test anything"
    with pytest.raises(ModelError, match=r"--base original: .* is stored quantized"):
        export_merged(source, tmp_path / "original", Options(base="original"))


# ---- shards, folders, revisions


def test_shards_are_the_same_base_as_one_file(small_model: Path, tmp_path: Path):
    network = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.bfloat16)
    folder = shutil.copytree(small_model, tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    network.save_pretrained(str(folder), max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    one, several = (load_model(Base(str(f), compute_dtype="float32")) for f in (small_model, folder))
    assert base_fingerprint(one) == base_fingerprint(several)
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"base\.model .*cannot be loaded: .*" + shards[1].name):
        load_model(Base(str(folder)))


def hub_copy(cache: Path, commit: str, files: Path, **refs: str) -> None:
    """A repository of the hub as its client keeps it: a snapshot, and the branches and tags that name it."""
    home = cache / "models--someone--small"
    shutil.copytree(files, home / "snapshots" / commit)
    (home / "refs").mkdir(parents=True, exist_ok=True)
    for name in refs:
        (home / "refs" / name).write_text(commit)


def test_a_revision_is_what_is_loaded(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    other = save_small_model(tmp_path / "other", rms_norm_eps=0.1)
    hub_copy(cache, "a" * 40, small_model, main="")
    hub_copy(cache, "b" * 40, other, **{"v2.0": ""})
    _, newest = logprobs_of(Base("someone/small", compute_dtype="float32"))
    _, tagged = logprobs_of(Base("someone/small", revision="v2.0", compute_dtype="float32"))
    _, committed = logprobs_of(Base("someone/small", revision="a" * 40, compute_dtype="float32"))
    assert torch.equal(newest, committed) and not torch.equal(newest, tagged)
    assert torch.equal(tagged, logprobs_of(Base(str(other), compute_dtype="float32"))[1])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(Base("someone/small", revision="v3.0"))


def test_a_local_folder_has_no_revision(small_model: Path):
    with pytest.raises(ModelError, match=r"base\.revision got 'v1'; a local folder"):
        load_model(Base(str(small_model), revision="v1"))


# ---- what isn't quantized


def test_head_and_embeddings_that_stay_unquantized_are_said_with_their_bytes(small_model: Path):
    model = load_model(Base(str(small_model), compute_dtype="float32"))
    size = len(model.tokenizer) * 64 * 4
    assert dict(model.unquantized) == {"embeddings": size, "head": size}
    assert (
        describe_kept(model)
        == f"kept unquantized: embeddings {size / 2**20:.1f} MiB, head {size / 2**20:.1f} MiB"
    )
    plain = load_model(Base(str(small_model), quantization="none"))
    assert describe_kept(plain) == ""


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_embeddings_that_are_the_head_too_count_once(tmp_path: Path):
    folder = save_small_model(tmp_path, tie_word_embeddings=True)
    model = load_model(Base(str(folder), compute_dtype="bfloat16"), Adapter(rank=4))
    assert dict(model.unquantized) == {"embeddings and head, which are one": len(model.tokenizer) * 64 * 2}


def test_experts_that_stay_unquantized_are_said(tmp_path: Path):
    """bitsandbytes quantizes linear layers; experts in one tensor are none."""
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    build(config).bfloat16().save_pretrained(tmp_path)
    sizes = unquantized_bytes(load_base(Base(str(tmp_path), compute_dtype="bfloat16")))
    # Gate, up and down projections of each of 4 experts in each of 2 layers, 2 bytes a value.
    assert next(iter(sizes)) == "experts" and sizes["experts"] == 3 * 64 * 128 * 4 * 2 * 2
    assert sizes["head"] == sizes["embeddings"] == 97 * 64 * 2


def test_a_run_says_what_is_kept_unquantized(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(16)))
    recipe = Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(tmp_path / "pairs.jsonl")),
        training=Training(pairs_per_step=8, max_steps=1),
        run_directory=str(tmp_path / "run"),
    )
    train(recipe)
    assert "kept unquantized: embeddings 0.1 MiB, head 0.1 MiB" in capsys.readouterr().out
