"""GGUF exports: the converter as a process of its own, and what the look at its file finds.

A stand-in plays llama.cpp's converters here; `test_gguf_llama_cpp.py` has the real ones. What reads GGUF
needs the gguf package, and is skipped without it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_small_model
from safetensors.torch import load_file, save_file

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.gguf import check as gguf_check
from lora_dpo.export.gguf.adapter import prepare, scale_of
from lora_dpo.export.gguf.check import Check, check_adapter, check_model, turn
from lora_dpo.export.gguf.converter import ADAPTERS, MODELS, find_converter
from lora_dpo.export.gguf.making import export_gguf, export_gguf_adapter, gguf_adapter_command, gguf_command
from lora_dpo.export.gguf.tensors import headers
from lora_dpo.model import load_config, load_tokenizer
from lora_dpo.recipe import Base

needs_gguf = pytest.mark.skipif(not gguf_check.package_is_there(), reason="takes the gguf package")

STAND_IN = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--outfile") + 1])
notes = pathlib.Path(__file__).with_name("notes.json")
way = pathlib.Path(__file__).with_name("way").read_text()
if "crash" in way:
    print("the last word: " + way)
    sys.exit(3)
if "lazy" in way:
    print(way.removeprefix("lazy"))
    sys.exit(0)
if "silent" in way:
    sys.exit(4)
made = pathlib.Path(__file__).with_name("made.gguf")
out.write_bytes(made.read_bytes() if made.is_file() else b"GGUF" + bytes(2 << 20))
seen = {"pid": os.getpid(), "words": words, "first": sys.path[0], "offline": os.environ["HF_HUB_OFFLINE"]}
adapter = pathlib.Path(words[-1]) / "adapter_config.json"
seen["adapter"] = json.loads(adapter.read_text()) if adapter.is_file() else None
notes.with_suffix(".part").write_text(json.dumps(seen))
notes.with_suffix(".part").rename(notes)
if "wait" in way:
    time.sleep(600)
if "half" in way:
    sys.exit("half-way")
"""


@pytest.fixture
def stand_in(tmp_path: Path):
    """A folder like llama.cpp's; a call says how its converters behave and names one of them."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in (MODELS, ADAPTERS):
        (folder / name).write_text(STAND_IN)

    def behave(way: str = "works", name: str = MODELS) -> Path:
        (folder / "way").write_text(way)
        return folder / name

    return behave


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch):
    """As if the gguf package were not installed: the stand-in writes no GGUF."""
    monkeypatch.setattr(gguf_check, "package_is_there", lambda: False)


def notes_of(script: Path) -> dict[str, Any]:
    return json.loads(script.with_name("notes.json").read_text())


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# finding it


def test_a_converter_is_found_in_the_folder_then_by_the_variable_then_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    places = []
    for name in ("given", "variable", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODELS).touch()
        places.append(tmp_path / name / MODELS)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "variable"))
    assert find_converter(tmp_path / "given", MODELS) == places[0]
    assert find_converter(places[0], MODELS) == places[0]
    assert find_converter(None, MODELS) == places[1]
    monkeypatch.delenv("LLAMA_CPP")
    assert find_converter(None, MODELS) == places[2]
    assert find_converter(None, ADAPTERS) is None


def test_a_folder_that_is_named_and_has_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RunError, match=rf"--llama-cpp: {MODELS} is not in"):
        find_converter(tmp_path, MODELS)
    with pytest.raises(RunError, match="no such folder"):
        find_converter(tmp_path / "nowhere", MODELS)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(RunError, match=r"\$LLAMA_CPP: "):
        find_converter(None, ADAPTERS)


def test_without_a_converter_the_exact_command_is_said(small_model: Path, tmp_path: Path):
    to_file = tmp_path / "my models" / "m.gguf"
    with pytest.raises(ModelError, match="git clone") as error:
        export_gguf(small_model, to_file, "bfloat16", None)
    line = f"python llama.cpp/{MODELS} {small_model} --outfile '{to_file}' --outtype bf16"
    assert line in str(error.value) and line == gguf_command(small_model, to_file, "bfloat16", None)
    assert not to_file.parent.exists()


# running it


def test_the_file_appears_under_its_name_with_what_was_asked_for(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path, unchecked: None
):
    script, told = stand_in(), []
    to_file = tmp_path / "out" / "m{ftype}.gguf"
    export = export_gguf(small_model, to_file, "float16", script, progress=told.append)
    assert left_in(to_file.parent) == ["m{ftype}.gguf"]
    assert to_file.read_bytes().startswith(b"GGUF")
    seen = notes_of(script)
    assert seen["words"][:2] == [str(small_model), "--outfile"] and seen["words"][3:] == ["--outtype", "f16"]
    assert "{" not in seen["words"][2]  # the real one would fill it in
    assert seen["first"] == str(script.parent) and seen["offline"] == "1"
    assert sum(told) == 2
    assert any("not checked" in line and "lora-dpo[gguf]" in line for line in export.describe())


def test_what_is_there_already_is_kept(small_model: Path, stand_in: Callable[..., Path], tmp_path: Path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        export_gguf(small_model, tmp_path / "m.gguf", "float32", stand_in())
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("crash", "status 3"),
        ("half", "half-way"),
        ("crash: No module named 'sentencepiece'", "pip install sentencepiece"),
        ("crash: BPE pre-tokenizer was not recognized", "fingerprint"),
        ("crash: OSError: [Errno 28] No space left on device", "The disk is full"),
        ("crash: File not found: m/tokenizer.model", "copy tokenizer.model"),
        ("crash: KeyError: 'n_ctx'", "llama.cpp's requirements"),
        ("crash: Model OddForCausalLM is not supported", "doesn't convert the architecture"),
    ],
)
def test_a_converter_that_fails_leaves_nothing_and_its_last_lines(
    way: str, said: str, small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError) as error:
        export_gguf(small_model, tmp_path / "out" / "m.gguf", "float32", stand_in(way))
    assert said in str(error.value)
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("lazy: nothing to do", "ended with status 0 but wrote no file; its last lines:\n: nothing to do"),
        ("lazy", "ended with status 0 but wrote no file, and printed nothing"),
        ("silent", "failed (status 4), and printed nothing"),
    ],
)
def test_a_converter_that_writes_or_says_nothing_is_told_of_so(
    way: str, said: str, small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ModelError) as error:
        export_gguf(small_model, tmp_path / "m.gguf", "float32", stand_in(way))
    assert str(error.value) == f"{MODELS} {said}"


def test_what_a_converter_prints_cannot_command_the_terminal(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    way = "crash \x1b[31mred\x1b[0m \x1b]0;title\x07 nul\x00 \x9b2J tab\t\u202eodd \U000e0001 é 漢"
    with pytest.raises(ModelError) as error:
        export_gguf(small_model, tmp_path / "m.gguf", "float32", stand_in(way))
    last = str(error.value).splitlines()[-1]
    assert last == (
        r"the last word: crash red \x1b]0;title\x07 nul\x00 \x9b2J tab    \u202eodd \U000e0001 é 漢"
    )


def test_an_interpreter_that_is_not_there_is_said(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ModelError, match="cannot be started with /no/python"):
        export_gguf(small_model, tmp_path / "m.gguf", "float32", stand_in(), python="/no/python")


def is_gone(process: int) -> bool:
    """Whether a process has ended, within ten seconds; a dead one that nobody waits for counts."""
    for _ in range(200):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_an_export_that_is_stopped_ends_the_converter_and_leaves_nothing(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    script = stand_in("wait")

    def stop(_: int) -> None:
        while not script.with_name("notes.json").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export_gguf(small_model, tmp_path / "out" / "m.gguf", "float32", script, progress=stop)
    assert is_gone(notes_of(script)["pid"])
    assert left_in(tmp_path / "out") == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux about a process")
def test_a_killed_export_takes_the_converter_along_and_a_second_one_succeeds(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path, unchecked: None
):
    script, to_file = stand_in("wait"), tmp_path / "out" / "m.gguf"
    code = (
        "import sys; from pathlib import Path; from lora_dpo.export.gguf.making import export_gguf\n"
        "model, out, script = map(Path, sys.argv[1:]); export_gguf(model, out, 'float32', script)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", code, small_model, to_file, script]
    process = subprocess.Popen(words, env=environment)
    try:
        while not script.with_name("notes.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert is_gone(notes_of(script)["pid"])
    assert not to_file.exists()
    export_gguf(small_model, to_file, "float32", stand_in("works"))
    assert left_in(to_file.parent) == ["m.gguf"]


def test_a_folder_that_is_no_model_is_said(tmp_path: Path, stand_in: Callable[..., Path]):
    with pytest.raises(ModelError, match=r"no config\.json"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "float32", stand_in())


# adapters


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Rank 4 on q_proj of both layers and on down_proj of the first, in PEFT's layout."""
    folder.mkdir()
    torch.manual_seed(4)
    made: dict[str, torch.Tensor] = {}
    for module, (out, into) in {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.1.self_attn.k_proj": (32, 64),
        "model.layers.0.mlp.down_proj": (64, 128),
    }.items():
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, into)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 4)
    save_file({**made, **(tensors or {})}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


ODD = "base_model.model.model."
KINDS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "dora": ({"use_dora": True}, None, "DoRA"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, None, "trainable_token_indices"),
    "expert parameters": ({"target_parameters": ["experts.down_proj"]}, None, "target_parameters"),
    "biases": ({"bias": "lora_only"}, None, r"\(bias\)"),
    "transposed": ({"fan_in_fan_out": True}, None, "transposed"),
    "a norm that llama.cpp would pass over": ({}, f"{ODD}norm.weight", "no factor"),
    "whole embeddings": ({}, f"{ODD}embed_tokens.base_layer.weight", "save_embedding_layers"),
    "an expert": ({}, f"{ODD}layers.0.mlp.experts.0.up_proj.lora_A.weight", "one of many experts"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_llama_cpp_has_no_place_for_are_refused_with_the_alternative(
    kind: str, small_model: Path, tmp_path: Path
):
    config, extra, reason = KINDS[kind]
    adapter = write_adapter(tmp_path / "a", {extra: torch.zeros(64)} if extra else {}, **config)
    with pytest.raises(ModelError, match=rf"{reason}.*--to gguf merges"):
        export_gguf_adapter(adapter, Base(str(small_model)), tmp_path / "a.gguf", None)


@pytest.mark.parametrize("name", ["lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A"])
def test_heads_and_embeddings_of_a_tied_base_are_refused(name: str, tmp_path: Path):
    adapter = write_adapter(tmp_path / "a", {f"base_model.model.{name}": torch.zeros(4, 64)})
    tied = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="in a GGUF of this base"):
        export_gguf_adapter(adapter, Base(str(tied)), tmp_path / "a.gguf", None)


def test_an_adapter_is_converted_with_the_architecture_of_its_base(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path, unchecked: None
):
    script, to_file = stand_in(name=ADAPTERS), tmp_path / "out" / "a.gguf"
    adapter = write_adapter(tmp_path / "a")
    export = export_gguf_adapter(adapter, Base(str(small_model)), to_file, script)
    assert left_in(to_file.parent) == ["a.gguf"]
    words = notes_of(script)["words"]
    assert words[0] == "--base" and words[4:6] == ["--outtype", "f32"]
    assert any("serve it on" in line and "nf4" in line for line in export.describe())
    with pytest.raises(ModelError, match="git clone") as error:
        export_gguf_adapter(adapter, Base(str(small_model)), tmp_path / "b.gguf", None)
    assert gguf_adapter_command(adapter, Base(str(small_model)), tmp_path / "b.gguf", None) in str(
        error.value
    )
    assert "--base-model-id org/name" in gguf_adapter_command(adapter, Base("org/name"), to_file, None)


def test_the_scale_that_llama_cpp_computes_is_peft_s(tmp_path: Path):
    """alpha / rank · B is (alpha of the module) / √rank · B of the source, for every module."""
    config = {"use_rslora": True, "lora_alpha": 8, "alpha_pattern": {"layers.0.mlp.down_proj": 3}}
    adapter = write_adapter(tmp_path / "a", **config)
    values = json.loads((adapter / "adapter_config.json").read_text())
    prepare(adapter, values, tmp_path / "prepared")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "prepared"))
    made = json.loads((tmp_path / "prepared" / "adapter_config.json").read_text())
    assert made["lora_alpha"] == 8 * math.sqrt(4) and not made["use_rslora"]
    for name, tensor in before.items():
        if "lora_A" in name:
            assert torch.equal(after[name], tensor)
            continue
        alpha = 3 if "down_proj" in name else 8
        wanted = tensor.double() * alpha / math.sqrt(4)
        assert torch.allclose(after[name].double() * made["lora_alpha"] / 4, wanted, rtol=1e-6, atol=0), name
        if alpha == 8:
            assert torch.equal(after[name], tensor)
    assert scale_of(values, "model.layers.1.self_attn.k_proj", 4) == 4
    assert scale_of(values, "model.layers.0.mlp.down_proj", 4) == 1.5


# looking at the file


def llamas_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: what stands at 2 j and 2 j + 1 of a head came from j and from half a head further."""
    size = rows.shape[0] // heads
    pairs = [h * size + j for h in range(heads) for j in range(size // 2)]
    return rows[[place + part * size // 2 for place in pairs for part in (0, 1)]]


def write_gguf(file: Path, merged: Path, *, dtype: str = "F32", **changes: Any) -> Path:
    """What llama.cpp's converter writes for `save_small_model`, by hand. changes: "drop" a tensor, "alter"
    one, or keys by the name of what writes them.
    """
    gguf: Any = pytest.importorskip("gguf")
    tokenizer = load_tokenizer(Base(str(merged)))
    keys = {
        "context_length": 1024,
        "rope_freq_base": 10000.0,
        "eos_token_id": 2,
        "chat_template": tokenizer.chat_template,
        "token_list": [str(tokenizer.convert_ids_to_tokens(n)) for n in range(len(tokenizer))],
    } | {key: value for key, value in changes.items() if key not in ("drop", "alter")}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("model")
    for key, value in {"embedding_length": 64, "block_count": 2, "head_count": 4, "head_count_kv": 2}.items():
        getattr(writer, f"add_{key}")(value)
    for key, value in keys.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in load_file(merged / "model.safetensors").items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place == changes.get("drop"):
            continue
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        values = llamas_order(tensor.float(), heads) if heads else tensor.float()
        values = changes["alter"][1](values.clone()) if place == changes.get("alter", ("",))[0] else values
        kind = getattr(gguf.GGMLQuantizationType, dtype if values.ndim > 1 else "F32")
        stored = gguf.quants.quantize(values.contiguous().numpy(), kind)
        writer.add_tensor(place, stored, raw_dtype=kind)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    return file


def looked_at(tmp_path: Path, merged: Path, **changes: Any) -> Check:
    check = check_model(write_gguf(tmp_path / "m.gguf", merged, **changes), merged)
    assert check is not None
    return check


def test_queries_and_keys_are_turned_as_llama_cpp_turns_them():
    rows = torch.arange(16.0)[:, None] * torch.ones(1, 3)
    assert turn(rows, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(turn(rows, 2), llamas_order(rows, 2))
    assert torch.equal(turn(rows[:, 0], 4), llamas_order(rows[:, 0], 4))


@needs_gguf
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_faithful_file_is_found_faithful(dtype: str, small_model: Path, tmp_path: Path):
    check = looked_at(tmp_path, small_model, dtype=dtype)
    assert check.findings == []
    assert len(check.turned) == 4  # queries and keys of two layers
    assert len(check.equal) == len(headers(small_model)) - 4
    assert not (check.reordered or check.shapes or check.made)
    assert "to the bit" in check.describe()[0]


def changed(values: torch.Tensor) -> torch.Tensor:
    values.flatten()[-1] += 1
    return values


def infinite(values: torch.Tensor) -> torch.Tensor:
    values.flatten()[0] = math.inf
    return values


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor is missing": ({"drop": "blk.1.ffn_up.weight"}, "blk.1.ffn_up.weight, and is not"),
    "a value differs": ({"alter": ("blk.0.attn_v.weight", changed)}, "blk.0.attn_v.weight has other values"),
    "rows are exchanged": (
        {"alter": ("blk.0.ffn_up.weight", lambda v: v.flip(0))},
        "blk.0.ffn_up.weight has other values",
    ),
    "queries are as transformers has them": (
        {"alter": ("blk.0.attn_q.weight", lambda v: v.reshape(4, 8, 2, 64).transpose(1, 2).reshape(64, 64))},
        "blk.0.attn_q.weight has other values",
    ),
    "the shape differs": ({"alter": ("output.weight", lambda v: v[:-1])}, "has the shape"),
    "the dtype is another": ({"dtype": "Q8_0"}, "stored as Q8_0, which was not asked for"),
    "a value is infinite": ({"alter": ("output_norm.weight", infinite)}, "not finite"),
    "the context is another": ({"context_length": 512}, "context_length is 512"),
    "the context is missing": ({"context_length": None}, "context_length is not there"),
    "RoPE is another": ({"rope_freq_base": 5e5}, "rope_theta 10000"),
    "the template is another": ({"chat_template": "{{ messages }}"}, "chat template in the file is another"),
    "the template is missing": ({"chat_template": None}, "chat template in the file is none"),
    "the EOS is another": ({"eos_token_id": 7}, "EOS is token 7"),
    "tokens are missing": ({"token_list": ["a", "b"]}, "2 tokens for"),
    "it adds a BOS": ({"add_bos_token": True}, "adds BOS"),
}


@needs_gguf
@pytest.mark.parametrize("what", DAMAGE)
def test_what_differs_from_the_source_is_found(what: str, small_model: Path, tmp_path: Path):
    changes, said = DAMAGE[what]
    findings = looked_at(tmp_path, small_model, **changes).findings
    assert any(said in finding for finding in findings), findings


@needs_gguf
def test_turns_that_would_not_end_are_found(tmp_path: Path):
    """The file's EOS is right, but the template ends turns with a token that llama.cpp has no name for."""
    merged = save_small_model(tmp_path / "model")
    template = (merged / "chat_template.jinja").read_text().replace("<|im_end|>", "<|im_start|>")
    (merged / "chat_template.jinja").write_text(template)
    findings = looked_at(tmp_path, merged).findings
    assert any("generation would run on" in finding for finding in findings), findings


@needs_gguf
def test_a_token_that_differs_is_found(small_model: Path, tmp_path: Path):
    tokenizer = load_tokenizer(Base(str(small_model)))
    tokens = [str(tokenizer.convert_ids_to_tokens(n)) for n in range(len(tokenizer))]
    tokens[5] += "!"
    assert any("1 tokens differ" in f for f in looked_at(tmp_path, small_model, token_list=tokens).findings)


@needs_gguf
def test_a_cut_file_is_found(small_model: Path, tmp_path: Path):
    whole = write_gguf(tmp_path / "m.gguf", small_model).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match="no GGUF file, or only a part of one"):
            check_model(tmp_path / "cut.gguf", small_model)


@needs_gguf
def test_where_the_order_is_not_known_the_same_values_are_told_from_others(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_check, "KNOWN", frozenset())
    name = "model.layers.0.mlp.up_proj.weight"
    check = looked_at(tmp_path, small_model, alter=("blk.0.ffn_up.weight", lambda values: values.flip(0)))
    assert check.findings == [] and check.reordered == [name]
    check = looked_at(tmp_path, small_model, alter=("blk.0.ffn_up.weight", changed))
    assert check.findings == [] and check.shapes == [name]
    assert "by shape only" in check.describe()[0]


@needs_gguf
def test_an_adapter_s_factors_alpha_and_ranks_are_compared(small_model: Path, tmp_path: Path):
    gguf: Any = pytest.importorskip("gguf")
    adapter = write_adapter(tmp_path / "a")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        heads = 4 if "q_proj" in module else 2 if "k_proj" in module else None
        turned = llamas_order(tensor, heads) if heads and factor[0] == "B" else tensor
        place = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        tensors[f"{place}.lora_{factor[0].lower()}"] = turned.contiguous().numpy()

    def findings(alpha: float = 8.0, kind: str = "adapter", drop: str = "") -> list[str]:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_type(kind)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, values in tensors.items():
            if name != drop:
                writer.add_tensor(name, values)
        for part in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{part}_to_file")()
        writer.close()
        config = load_config(Base(str(small_model)))
        check = check_adapter(tmp_path / "a.gguf", adapter, config)
        assert check is not None
        assert bool(drop) or (len(check.equal), len(check.turned)) == (4, 2)
        return check.findings

    assert findings() == []
    assert "alpha is 16" in findings(alpha=16.0)[0]
    assert "general.type" in findings(kind="model")[0]
    assert any("only one of its two factors" in f for f in findings(drop="blk.0.attn_q.weight.lora_a"))


@needs_gguf
def test_findings_keep_the_file_from_appearing_unless_they_are_accepted(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path
):
    (tmp_path / "out").mkdir()
    script, to_file = stand_in(), tmp_path / "out" / "m.gguf"
    write_gguf(script.with_name("made.gguf"), small_model, alter=("blk.0.attn_v.weight", changed))
    with pytest.raises(ModelError, match=r"--accept keeps it.*\n.*attn_v.weight has other values"):
        export_gguf(small_model, to_file, "float32", script)
    assert left_in(tmp_path / "out") == []
    export = export_gguf(small_model, to_file, "float32", script, accept=True)
    assert left_in(tmp_path / "out") == ["m.gguf"]
    assert export.check is not None and "attn_v.weight has other values" in export.check.findings[0]


@needs_gguf
@pytest.mark.parametrize("accept", [False, True])
def test_what_is_no_gguf_file_is_never_kept(
    small_model: Path, stand_in: Callable[..., Path], tmp_path: Path, accept: bool
):
    """The stand-in writes four right bytes and then zeros."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError) as error:
        export_gguf(small_model, tmp_path / "out" / "m.gguf", "float32", stand_in(), accept=accept)
    assert "no GGUF file, or only a part of one" in str(error.value)
    assert "--accept" not in str(error.value)
    assert left_in(tmp_path / "out") == []
