"""The streaming merge gives what the whole merge in memory gives, for every kind of adapter and base, a few
rows at a time; what it can't merge it refuses, and whoever stops it leaves nothing in its place.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from builders import save_small_model, small_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import BASES, EXPERTS, KINDS, base_of, kind_of, stir
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)
from whole_merge import merged_network, merged_weight

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.merging import files as merged_module
from lora_dpo.export.merging import shards
from lora_dpo.export.merging.files import Settings, clear, merge
from lora_dpo.export.merging.kept import Kept, joined
from lora_dpo.export.merging.quantized import EightBit, FourBit, _encoder
from lora_dpo.export.merging.shards import Part, Tensors, shards_of, write_shard
from lora_dpo.model import load_model, save_adapter
from lora_dpo.model.skeleton import skeleton_of
from lora_dpo.recipe import Adapter, Base
from lora_dpo.run_directory import grow_folder


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Any]:
    done: list[int] = []
    yield done.append
    assert sum(done) == total, "the display is told of other bytes than were written"


def merged_tensors(
    base: Base, adapter: Path, folder: Path, settings: Settings | None = None
) -> tuple[dict[str, Tensor], dict[str, Kept]]:
    """What plain transformers loads of a streaming merge, and what was measured."""
    settings = settings or Settings(torch.float32)
    folder.mkdir()
    kept = merge(base, adapter, folder, settings, counting=counting)
    clear(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=settings.dtype, output_loading_info=True
    )
    network, info = loaded
    assert not any(info.values()), info
    return network.state_dict(), kept


def compare_with_whole(base: Base, adapter: Adapter, tmp_path: Path, bound: float = 1e-6) -> dict[str, Kept]:
    """The streamed model's tensors beside those of the whole merge in memory."""
    model = load_model(base, adapter)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    expected = merged_network(model, base, torch.float32).state_dict()
    found, kept = merged_tensors(
        base, tmp_path / "adapter", tmp_path / "merged", Settings(torch.float32, shard_size=10**5)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= bound, name
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file(), "it was not divided"
    return kept


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_as_it_acts(small_model: Path, tmp_path: Path, kind: str, base: str):
    # Trained tokens are float32, of which a bfloat16 base computes with the rounded rows: 2⁻⁹ of 0.1.
    bound = 3e-4 if "tokens" in kind and base == "nf4-bfloat16" else 1e-6
    kept = compare_with_whole(base_of(small_model, base), kind_of(kind), tmp_path, bound)
    assert kept, "nothing was measured"
    for name, one in kept.items():
        assert one.kept == pytest.approx(1, abs=1e-4), name
        assert one.size > 1e-3, f"{name} was not changed: nothing was tested"


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize("kind", ["default", "tokens", "dora-tokens"])
def test_embeddings_that_are_tied_stay_so_where_both_change_alike(tmp_path: Path, kind: str):
    folder = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    compare_with_whole(base_of(folder, "float32"), kind_of(kind), tmp_path)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    names = {name for file in (tmp_path / "merged").glob("*.safetensors") for name in load_file(file)}
    assert "lm_head.weight" not in names


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("default", "the head"),
        ("default", "both"),
        ("default", "both, and they differ"),
        ("tokens", "the head"),
        ("tokens", "both"),
    ],
)
def test_files_may_hold_either_of_two_that_are_tied(tmp_path: Path, kind: str, held: str):
    """transformers ties what is missing to what is there, and leaves what is there and differs apart."""
    folder = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (0.5 if "differ" in held else 1)
    if held == "the head":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(folder, "float32")
    model = load_model(base, kind_of(kind))
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    found, _ = merged_tensors(base, tmp_path / "adapter", tmp_path / "merged")
    for module, name in (
        (model.causal.get_input_embeddings(), "model.embed_tokens"),
        (model.head, "lm_head"),
    ):
        assert torch.equal(found[f"{name}.weight"], merged_weight(module)), name


@pytest.mark.filterwarnings(
    "ignore:Model .*tie_word_embeddings",
    "ignore:`is_gradient_checkpointing`",
    "ignore:Setting `save_embedding_layers`",
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_was_tied_is_parted_where_one_changes(tmp_path: Path, target: str, whole: bool):
    """An adapter made elsewhere, on the head or the embeddings of a model that has one matrix for both.

    whole: peft saves embeddings and head beside the factors, as it does unless told otherwise.
    """
    folder = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    embeddings: Any = plain.get_input_embeddings()
    original = embeddings.weight.detach().clone()
    adapted: Any = get_peft_model(
        plain, LoraConfig(r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=whole)
    brought = [n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_" not in n]
    assert bool(brought) == whole
    base = base_of(folder, "float32")
    found, _ = merged_tensors(base, tmp_path / "adapter", tmp_path / "merged")
    module = adapted.get_output_embeddings() if target == "lm_head" else adapted.get_input_embeddings()
    delta = module.get_delta_weight("default").detach()
    changed, other = ("lm_head", "model.embed_tokens")[:: 1 if target == "lm_head" else -1]
    assert torch.equal(found[f"{other}.weight"], original)
    assert (found[f"{changed}.weight"] - (original + delta)).abs().max() < 1e-6 < delta.abs().max()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_exactly_the_tensors_that_bitsandbytes_quantized_are_dequantized(
    small_model: Path, tmp_path: Path, quantization: str, double: bool
):
    base = Base(
        str(small_model),
        quantization=quantization,  # pyright: ignore[reportArgumentType]
        double_quantization=double,
        compute_dtype="float32",
    )
    compare_with_whole(base, Adapter(rank=4, targets=("q_proj",)), tmp_path)
    original = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).state_dict()
    same = {name for name, tensor in original.items() if torch.equal(tensor, found[name])}
    assert same == {name for name in original if "_proj" not in name}


def small(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return sizes | changes


ARCHITECTURES: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **small(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: MixtralConfig(**small(num_local_experts=4)),
    "gpt_oss": lambda: GptOssConfig(
        **small(
            head_dim=16,
            num_local_experts=4,
            layer_types=["full_attention"] * 2,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    "gemma3": lambda: Gemma3TextConfig(**small(head_dim=16)),
    "phi3": lambda: Phi3Config(**small(pad_token_id=0, eos_token_id=2, bos_token_id=1)),
}


def save_architecture(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).bfloat16().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_layouts_of_other_architectures_merge(tmp_path: Path, name: str, base: str, dora: bool):
    """GPT-2 keeps weights transposed, Gemma ties its head, Phi holds queries, keys and values in one."""
    folder = save_architecture(name, tmp_path / "base")
    compare_with_whole(base_of(folder, base), Adapter(rank=4, dora=dora), tmp_path)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_merge_whether_a_checkpoint_holds_them_apart_or_together(
    tmp_path: Path, name: str, base: str
):
    folder = save_architecture(name, tmp_path / "base")
    adapter = Adapter(rank=4, targets=("q_proj",), expert_targets=EXPERTS)
    # The whole merge rounds an expert's update to the base's bfloat16, this one doesn't.
    compare_with_whole(base_of(folder, base), adapter, tmp_path, 1e-6 if base == "float32" else 1e-3)
    names = {n for file in (tmp_path / "base").glob("*.safetensors") for n in load_file(file)}
    made = {n for file in (tmp_path / "merged").glob("*.safetensors") for n in load_file(file)}
    assert made == names, "the merged model is laid out as the base is"


@pytest.mark.parametrize("shape", [(8, 64), (100, 48), (33, 40), (300, 1000)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_quantized_weight_are_bitsandbytes_own(
    shape: tuple[int, int], double: bool, kind: str, dtype: torch.dtype
):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    weight[0] = 0
    expected = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    )
    ours = FourBit.of(weight, kind, double=double)
    step = ours.step
    made = torch.cat([ours.rows(n, min(step, shape[0] - n)) for n in range(0, shape[0], step)])
    assert made.dtype == dtype
    assert torch.equal(made, expected)


def test_the_quick_way_to_quantize_is_taken_and_gives_the_same_codes_at_the_bounds():
    code = functional.get_4bit_type("nf4", device="cpu")
    bounds = ((code[1:] + code[:-1]) / 2).tolist()
    near = [math.nextafter(b, b + s) for b in bounds for s in (-1, 0, 1)]
    block = torch.tensor([1.0, *near, *torch.linspace(-1, 1, 82).tolist()])[:128].repeat(4)
    weight = block.view(8, 64)
    encode = _encoder(weight, "nf4")
    assert encode.__name__ == "quick"
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    ours = encode(weight.reshape(-1))
    assert torch.equal(ours[0], packed.reshape(-1))
    assert torch.equal(ours[1], state.absmax)


def test_where_bitsandbytes_rounds_otherwise_it_is_followed(monkeypatch: pytest.MonkeyPatch):
    real = functional.get_4bit_type
    monkeypatch.setattr(functional, "get_4bit_type", lambda *given, **named: real(*given, **named) * 0.9)
    assert _encoder(torch.randn(8, 64), "nf4").__name__ == "plain"


def test_rows_of_an_int8_weight_are_bitsandbytes_own():
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(values, scales)
    ours = EightBit.of(weight)
    assert torch.equal(torch.cat([ours.rows(n, 8) for n in range(0, 40, 8)]), expected)


def test_a_float16_export_is_refused_where_a_weight_overflows(small_model: Path, tmp_path: Path):
    weights = load_file(small_model / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    base = tmp_path / "base"
    base.mkdir()
    for file in small_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = an_adapter(small_model, tmp_path)
    with pytest.raises(ModelError, match=r"model\.norm\.weight does not fit float16: .*bf16 or fp32"):
        merged_tensors(base_of(base, "float32"), adapter, tmp_path / "half", Settings(torch.float16))


def an_adapter(base: Path, tmp_path: Path, **options: Any) -> Path:
    model = load_model(base_of(base, "float32"), Adapter(**{"rank": 4, **options}))
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_whole_weights_that_peft_saves_beside_its_factors_have_to_be_the_bases(
    small_model: Path, tmp_path: Path, target: str
):
    plain = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(plain, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    found, _ = merged_tensors(base_of(small_model, "float32"), tmp_path / "adapter", tmp_path / "merged")
    merged = adapted.float().merge_and_unload().state_dict()
    assert all((found[name] - merged[name].float()).abs().max() < 1e-5 for name in found)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    brought = [name for name in tensors if "lora_" not in name]
    assert brought, "nothing was tested"
    tensors[brought[0]].view(torch.int16)[7, 5] ^= 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"brings another \S+weight than the base's"):
        merged_tensors(base_of(small_model, "float32"), tmp_path / "adapter", tmp_path / "other")


def test_an_adapter_of_another_base_is_refused_by_name(small_model: Path, tmp_path: Path):
    adapter = an_adapter(small_model, tmp_path)
    other = save_small_model(tmp_path / "other", hidden_size=32, num_attention_heads=4)
    with pytest.raises(ModelError, match="does not fit this base"):
        merged_tensors(base_of(other, "float32"), adapter, tmp_path / "merged")


def test_a_tensor_that_no_layer_has_a_place_for_is_refused(small_model: Path, tmp_path: Path):
    adapter = an_adapter(small_model, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.9"):
        merged_tensors(base_of(small_model, "float32"), adapter, tmp_path / "merged")


def test_values_that_are_not_finite_are_refused_by_name(small_model: Path, tmp_path: Path):
    adapter = an_adapter(small_model, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name][0, 0] = math.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"{name} holds values that are not finite"):
        merged_tensors(base_of(small_model, "float32"), adapter, tmp_path / "merged")


def test_the_original_weights_are_those_of_the_files(small_model: Path, tmp_path: Path):
    adapter = an_adapter(small_model, tmp_path)
    plain, _ = merged_tensors(base_of(small_model, "float32"), adapter, tmp_path / "a")
    base = base_of(small_model, "nf4-bfloat16")
    original, _ = merged_tensors(base, adapter, tmp_path / "b", Settings(torch.float32, original=True))
    trained, _ = merged_tensors(base, adapter, tmp_path / "c")
    assert all(torch.equal(plain[name], original[name]) for name in plain)
    assert not torch.equal(
        plain["model.layers.0.mlp.up_proj.weight"], trained["model.layers.0.mlp.up_proj.weight"]
    )


def test_what_is_kept_is_as_by_hand():
    weight, wanted = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])
    half = Kept()
    half.add(weight, wanted, torch.tensor([1.25, 2.5]))  # ½ of the update, and 0.5 beside it
    assert half.kept == pytest.approx(0.5)
    assert half.error == pytest.approx((0.25**2 + 0.5**2) ** 0.5 / 0.5)
    assert half.size == pytest.approx(0.5 / 5**0.5)
    whole, nothing = Kept(), Kept()
    whole.add(weight, wanted, wanted)
    nothing.add(weight, weight, weight)
    assert (whole.kept, whole.error, nothing.kept, nothing.error) == (1, 0, None, 0)
    assert joined([half, whole]).kept == pytest.approx(0.75)


def test_bfloat16_loses_small_updates_and_says_how_much(small_model: Path, tmp_path: Path):
    """Of an update of 0.1% bfloat16 keeps about half, float16 about all: so measured on Gaussian weights."""
    model = load_model(base_of(small_model, "nf4-bfloat16"), Adapter(rank=16))
    generator = torch.Generator().manual_seed(0)
    for layer in model.adapter_layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data = torch.randn(a.shape, generator=generator)
        b.data = torch.randn(b.shape, generator=generator)
        norm = (b @ a).norm() * layer.scaling["default"]
        b.data *= 1e-3 * layer.get_base_layer().weight.quant_state.absmax.numel() ** 0 * 0.02 * 64 / norm
    save_adapter(model, tmp_path / "adapter")
    shares = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kept = merged_tensors(
            base_of(small_model, "nf4-bfloat16"), tmp_path / "adapter", tmp_path / str(dtype), Settings(dtype)
        )[1]
        shares[dtype] = joined(kept.values()).kept
    assert 0.2 < shares[torch.bfloat16] < 0.9 < 0.95 < shares[torch.float16] <= 1.01
    assert shares[torch.float32] == pytest.approx(1, abs=1e-3)


def test_a_second_call_takes_over_the_shards_that_were_whole(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = an_adapter(small_model, tmp_path)
    base, settings = base_of(small_model, "nf4-bfloat16"), Settings(torch.bfloat16, shard_size=50_000)
    whole, kept = merged_tensors(base, adapter, tmp_path / "whole", settings)
    written: list[str] = []

    def write_some(file: Path, *given: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write_shard(file, *given)

    @contextlib.contextmanager
    def silent(what: str, total: int) -> Iterator[Any]:
        yield lambda count: None

    def fill(part: Path) -> None:
        again.append(merge(base, adapter, part, settings, counting=silent))
        clear(part)

    again: list[dict[str, Kept]] = []
    monkeypatch.setattr(merged_module, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        grow_folder(tmp_path / "out", fill)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.part").glob("*.safetensors"))) == 2
    first, later = list(written), []
    monkeypatch.setattr(
        merged_module,
        "write_shard",
        lambda file, *given: (later.append(file.name), write_shard(file, *given)),
    )
    grow_folder(tmp_path / "out", fill)
    assert not set(first) & set(later), "shards that were whole were made again"
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in files)
    assert again[0] == kept, "what was measured of the first shards was lost"
    assert not (tmp_path / ".out.part").exists()
    assert whole


def test_what_was_begun_otherwise_is_not_taken_over(small_model: Path, tmp_path: Path):
    adapter = an_adapter(small_model, tmp_path)
    base, folder = base_of(small_model, "float32"), tmp_path / "part"
    folder.mkdir()
    with counting("", 0) as _:
        pass
    merge(base, adapter, folder, Settings(torch.float32, shard_size=50_000), counting=counting)
    merge(base, adapter, folder, Settings(torch.bfloat16), counting=counting)
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    # The same settings, another adapter: the counting would not be told of any bytes.
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, adapter / "adapter_model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    merge(base, adapter, folder, Settings(torch.bfloat16), counting=counting)
    assert (folder / "model.safetensors").read_bytes() != before


def test_two_processes_do_not_fill_one_folder(tmp_path: Path):
    def fill(part: Path) -> None:
        with pytest.raises(RunError, match="another process is writing"):
            grow_folder(tmp_path / "out", lambda other: None)
        (part / "file").write_text("mine")

    grow_folder(tmp_path / "out", fill)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("dtype", [*shards.DTYPES.values()])
def test_every_dtype_goes_through_a_file_as_it_is(tmp_path: Path, dtype: torch.dtype):
    made = {
        "matrix": torch.arange(60, dtype=torch.float32).reshape(12, 5).to(dtype),
        "number": torch.tensor(3.0).to(dtype),
        "nothing": torch.zeros(0, 4, dtype=dtype),
    }
    parts = [
        Part(n, t.dtype, tuple(t.shape), lambda t=t: iter(t.split(5) if t.ndim else [t]))
        for n, t in made.items()
    ]
    write_shard(tmp_path / "x.safetensors", parts)
    loaded = load_file(tmp_path / "x.safetensors")
    with Tensors([tmp_path / "x.safetensors"]) as tensors:
        for name, tensor in made.items():
            for found in (loaded[name], tensors.read(name)):
                assert found.dtype == dtype
                assert torch.equal(found.float(), tensor.float())
        assert torch.equal(tensors.read("matrix", 3, 4).float(), made["matrix"][3:7].float())


def test_shards_hold_at_most_their_size_or_one_tensor():
    parts = [
        Part(str(n), torch.uint8, (size,), lambda: iter(())) for n, size in enumerate([3, 4, 9, 1, 1, 5])
    ]
    sizes = [[part.size for part in shard] for shard in shards_of(parts, 7)]
    assert sizes == [[3, 4], [9], [1, 1, 5]]


def test_an_error_while_a_tensor_is_made_is_not_lost(tmp_path: Path):
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(2)
        raise ModelError("this one")

    part = Part("a", torch.float32, (4,), broken)
    with pytest.raises(ModelError, match="this one"):
        write_shard(tmp_path / "x.safetensors", [part] * 1)


def test_a_skeleton_has_the_dtypes_and_quantized_modules_of_the_base_as_loaded(small_model: Path):
    base = base_of(small_model, "nf4-bfloat16")
    skeleton, loaded = skeleton_of(base), load_model(base).causal
    from lora_dpo.model.base import QUANTIZED

    assert skeleton.quantized == {n for n, m in loaded.named_modules() if isinstance(m, QUANTIZED)}
    for name, parameter in loaded.named_parameters():
        if not skeleton.is_quantized(name):
            assert skeleton.own[name].dtype == parameter.dtype, name
