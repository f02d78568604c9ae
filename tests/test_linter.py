"""What leaves as an adapter loads elsewhere, and what a server would choke on is said, nothing else."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CHATML, pair_rows, save_small_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export.adapter import export_adapter
from lora_dpo.export.serving import linter
from lora_dpo.export.serving.commands import commands
from lora_dpo.export.serving.linter import Finding, lint
from lora_dpo.model import dequantized, load_adapter, load_model
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Source:
    """What is exported, as the command line has it."""

    adapter: Path
    base: Base
    run: RunDirectory | None = None


def by_peft(base: Path, to: Path, *, name: str | None = "someone/small", **options: Any) -> Path:
    """An adapter as PEFT alone makes and saves it. name: what its config calls the base."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    made = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **PLAIN | options))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    made.save_pretrained(str(to), save_embedding_layers=False)
    return changed(to, base_model_name_or_path=name)


def by_hand(to: Path, ranks: dict[str, int], **values: Any) -> Path:
    """A folder with a config and factors of these ranks, by module; 8 inputs and outputs each."""
    to.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/small", **PLAIN} | values
    (to / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(rank, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(8, rank)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def changed(folder: Path, **values: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def plain(folder: Path | str) -> Base:
    return Base(str(folder), quantization="none", compute_dtype="float32")


def kinds(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.server, finding.severity) for finding in findings]


# ---- what is said


def test_nothing_is_said_of_a_plain_adapter(small_model: Path, tmp_path: Path):
    assert lint(by_peft(small_model, tmp_path / "a"), plain(small_model)) == []


def test_nothing_is_said_of_a_base_that_is_not_here(tmp_path: Path):
    folder = by_hand(tmp_path / "a", {"lm_head": 4, "q_proj": 4})
    (folder / "chat_template.jinja").write_text(CHATML)
    assert kinds(lint(folder, plain("someone/small"))) == [("vLLM", "maybe")]


WHOLE = "modules_to_save"
SAID = {
    "DoRA": ({"use_dora": True}, ["vLLM", "llama.cpp"], "refused", "it is a DoRA"),
    "saved head": ({WHOLE: ["lm_head"]}, ["vLLM", "llama.cpp"], "refused", r"modules_to_save: lm_head"),
    "tokens": ({"trainable_token_indices": [5, 9]}, ["vLLM", "llama.cpp"], "refused", "single tokens"),
    "rsLoRA": ({"use_rslora": True}, ["llama.cpp"], "wrong", r"4 of 4 modules .* by 2 instead of 4$"),
    "alphas": (
        {"alpha_pattern": {"q_proj": 3}},
        ["vLLM", "llama.cpp"],
        "wrong",
        r"2 of 4 modules .*q_proj by 2 instead of 0\.75$",
    ),
    "ranks": ({"rank_pattern": {"v_proj": 2}}, ["vLLM"], "wrong", r"v_proj by 2 instead of 4$"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, ["vLLM"], "maybe", "LoRA on the embeddi"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, ["vLLM"], "maybe", "LoRA on the head"),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_a_server_chokes_on_is_said_with_a_way_out(small_model: Path, tmp_path: Path, kind: str):
    options, servers, severity, said = SAID[kind]
    found = lint(by_peft(small_model, tmp_path / "a", **options), plain(small_model))
    assert kinds(found) == [(server, severity) for server in servers]
    for finding in found:
        assert re.search(said, finding.what)
        assert "lora-dpo export RUN --to " in finding.remedy
        assert str(finding) == f"{finding.server}: {severity}: {finding.what}. {finding.remedy}"


@pytest.mark.parametrize("names", [["norm"], ["input_layernorm", "norm"]])
def test_saved_norms_are_what_llama_cpp_leaves_out_in_silence(
    small_model: Path, tmp_path: Path, names: list[str]
):
    found = lint(by_peft(small_model, tmp_path / "a", modules_to_save=names), plain(small_model))
    assert kinds(found) == [("vLLM", "refused"), ("llama.cpp", "wrong")]
    assert "norms are left out" in found[1].what


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_tensor_that_is_embeddings_and_head_takes_no_factors_in_llama_cpp(tmp_path: Path, target: str):
    base = save_small_model(tmp_path / "tied", tie_word_embeddings=True)
    folder = by_peft(base, tmp_path / "a", target_modules=["q_proj", target])
    found = lint(folder, plain(base))
    assert kinds(found) == [("llama.cpp", "refused"), ("vLLM", "maybe")]
    assert "embeddings and head are one tensor" in found[0].what


def test_experts_and_transposed_weights_are_said(tmp_path: Path):
    """The factors of experts are stacked: 40 experts of rank 2 have 80 rows, and no rank of 80."""
    names = {"model.layers.0.mlp.experts": 80, "model.layers.0.mlp.experts.base_layer": 80}
    experts = by_hand(tmp_path / "a", names, target_parameters=["mlp.experts.up", "mlp.experts.down"])
    found = lint(experts, plain("someone/small"))
    assert kinds(found) == [("llama.cpp", "refused"), ("vLLM", "maybe")]
    assert all("target_parameters: mlp.experts.down, mlp.experts.up" in finding.what for finding in found)
    gpt2 = by_hand(tmp_path / "b", {"h.0.attn.c_attn": 4}, fan_in_fan_out=True)
    found = lint(gpt2, plain("someone/small"))
    assert kinds(found) == [("vLLM", "refused"), ("llama.cpp", "refused")]
    assert all("transposed (fan_in_fan_out)" in finding.what for finding in found)


@pytest.mark.parametrize(
    ("rank", "flag"),
    [(16, None), (17, 32), (64, 64), (65, 128), (257, 320), (321, 512), (512, 512), (513, 0)],
)
def test_a_rank_above_vllms_default_names_the_flag(tmp_path: Path, rank: int, flag: int | None):
    folder = by_hand(tmp_path / "a", {"q_proj": rank}, r=rank)
    found = lint(folder, plain("someone/small"))
    made = commands(folder, plain("someone/small"))
    if flag is None:
        assert found == [] and "--max-lora-rank 16" in made["vLLM"]
        return
    assert kinds(found) == [("vLLM", "refused")]
    assert f"rank {rank} is above --max-lora-rank, which is 16 by default" in found[0].what
    if flag:
        assert found[0].remedy == f"Give vllm serve --max-lora-rank {flag}" and found[0].option
        assert made["vLLM"].endswith(f"--max-lora-rank {flag}")
    else:
        assert "and 512 at most" in found[0].what and "merged" in found[0].remedy
        assert "vLLM" not in made and "llama.cpp" in made


def test_of_several_ranks_the_largest_counts(tmp_path: Path):
    """With alphas that go with them every module is scaled by 2, as vLLM does; llama.cpp takes one alpha."""
    patterns = {"rank_pattern": {"v_proj": 40}, "alpha_pattern": {"v_proj": 80}}
    folder = by_hand(tmp_path / "a", {"q_proj": 4, "v_proj": 40}, **patterns)
    found = lint(folder, plain("someone/small"))
    assert kinds(found) == [("vLLM", "refused"), ("llama.cpp", "wrong")]
    assert found[0].remedy.endswith("--max-lora-rank 64")
    assert "1 of 2 modules would be scaled wrongly, v_proj by 0.2 instead of 2" in found[1].what


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alphas", [{}, {"q_proj": 3.0, "layers.1.self_attn.v_proj": 7.0}])
@pytest.mark.parametrize("ranks", [{}, {"v_proj": 2}, {"layers.0.self_attn.q_proj": 16}])
def test_wrong_scales_are_those_that_peft_has_otherwise(
    small_model: Path, tmp_path: Path, rslora: bool, alphas: dict[str, float], ranks: dict[str, int]
):
    options = {"use_rslora": rslora, "alpha_pattern": alphas, "rank_pattern": ranks}
    folder = by_peft(small_model, tmp_path / "a", **options)
    network = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32)
    layers = {
        name.removeprefix("base_model.model."): (layer.scaling["default"], layer.r["default"])
        for name, layer in PeftModel.from_pretrained(network, str(folder)).named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    assert len(layers) == 4
    whole = 8 / math.sqrt(4) if rslora else 8 / 4
    wrong = {
        "vLLM": sum(scale != whole for scale, _ in layers.values()),
        "llama.cpp": sum(scale != 8 / rank for scale, rank in layers.values()),
    }
    found = {f.server: f.what for f in lint(folder, plain(small_model)) if f.severity == "wrong"}
    assert found.keys() == {server for server, count in wrong.items() if count}
    for server, what in found.items():
        assert f": {wrong[server]} of 4 modules would be scaled wrongly" in what
        told = re.search(r", (\S+) by \S+ instead of (\S+)$", what)
        assert told is not None
        assert float(told[2]) == pytest.approx(layers[told[1]][0], rel=1e-5)


def test_much_float32_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linter, "LARGE", 2**20)
    folder = by_hand(tmp_path / "a", {"q_proj": 4})
    assert lint(folder, plain("someone/small")) == []
    factors = {
        "base_model.model.q_proj.lora_A.weight": torch.zeros(4, 40_000),
        "base_model.model.q_proj.lora_B.weight": torch.zeros(40_000, 4),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    (found,) = lint(folder, plain("someone/small"))
    assert (found.server, found.severity) == ("all", "note")
    assert found.what.startswith("1 MiB of it are float32")
    save_file({k: v.bfloat16() for k, v in factors.items()}, folder / "adapter_model.safetensors")
    assert lint(folder, plain("someone/small")) == []


def test_a_base_named_by_a_path_is_said(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = by_hand(tmp_path / "a", {"q_proj": 4})
    monkeypatch.chdir(small_model.parent)
    for name in (str(small_model), "./gone", "~/models/gone", small_model.name):
        (found,) = lint(changed(folder, base_model_name_or_path=name), plain("someone/small"))
        assert found.severity == "note" and repr(name) in found.what
    for name in (None, ""):
        (found,) = lint(changed(folder, base_model_name_or_path=name), plain("someone/small"))
        assert found.what == "adapter_config.json names no base"


@pytest.mark.parametrize(
    ("quantization", "double", "said"),
    [("nf4", True, True), ("nf4", False, False), ("fp4", True, False), ("int8", True, False)],
)
def test_a_quantized_base_is_said(tmp_path: Path, quantization: Any, double: bool, said: bool):
    folder = by_hand(tmp_path / "a", {"q_proj": 4})
    base = Base("someone/small", quantization=quantization, double_quantization=double)
    vllm, llama = lint(folder, base)
    assert kinds([vllm, llama]) == [("vLLM", "note"), ("llama.cpp", "note")]
    assert f"trained on the base in {quantization}; on 16-bit weights it is another function" in vllm.what
    assert ("--quantization bitsandbytes" in vllm.remedy) == said
    assert ("nf4 with double quantization only" in vllm.what) != said
    assert "--to gguf " in llama.remedy
    assert ("--quantization bitsandbytes" in commands(folder, base)["vLLM"]) == said


def test_a_base_whose_files_are_quantized_has_no_gguf(small_model: Path, tmp_path: Path):
    files = shutil.copytree(small_model, tmp_path / "base")
    config = json.loads((files / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (files / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    folder, base = by_hand(tmp_path / "a", {"q_proj": 4}), Base(str(files), double_quantization=False)
    found = lint(folder, base)
    assert kinds(found)[0] == ("llama.cpp", "refused") and "quantized by bitsandbytes" in found[0].what
    assert list(commands(folder, base)) == ["PEFT", "vLLM"]


def test_another_chat_template_is_said_and_given_to_the_servers(small_model: Path, tmp_path: Path):
    folder = by_peft(small_model, tmp_path / "an adapter's folder")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert lint(folder, plain(small_model)) == []
    (folder / "chat_template.jinja").write_text(CHATML + "{# mine #}")
    found = lint(folder, plain(small_model))
    assert kinds(found) == [("vLLM", "wrong"), ("llama.cpp", "wrong")]
    assert all("chat template of its own" in f.what and f.option for f in found)
    made, place = commands(folder, plain(small_model)), str(folder / "chat_template.jinja")
    assert shlex.split(made["vLLM"])[-2:] == ["--chat-template", place]
    assert shlex.split(made["llama.cpp"])[-3:] == ["--jinja", "--chat-template-file", place]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (told,) = lint(folder, plain(small_model))
    assert (told.server, told.severity, told.option) == ("all", "wrong", False)
    assert list(commands(folder, plain(small_model))) == ["PEFT"]


def test_the_worst_comes_first(small_model: Path, tmp_path: Path):
    options = {"use_rslora": True, "target_modules": ["q_proj", "lm_head"], "r": 32}
    found = lint(by_peft(small_model, tmp_path / "a", name=None, **options), plain(small_model))
    assert [finding.severity for finding in found] == ["refused", "wrong", "maybe", "note"]


BROKEN = {
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "another kind": lambda folder: changed(folder, peft_type="IA3"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "damaged weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100),
    "an expression without end": lambda folder: changed(folder, alpha_pattern={"(a*)*b": 1}),
    "a template that is none": lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_adapter_is_refused_in_words(tmp_path: Path, kind: str):
    folder = by_hand(tmp_path / "a", {"q_proj": 4})
    BROKEN[kind](folder)
    with pytest.raises(ModelError, match=r"adapter"):
        lint(folder, plain("someone/small"))


# ---- commands


def test_commands_of_a_hub_base_name_its_revision_and_quote_what_needs_it(tmp_path: Path):
    folder = by_hand(tmp_path / "mine & yours", {"q_proj": 4})
    made = commands(folder, Base("someone/small", revision="v2", trust_remote_code=True))
    assert made["vLLM"] == (
        "vllm serve someone/small --revision v2 --trust-remote-code --quantization bitsandbytes --enable-lora"
        f" --lora-modules 'mine-yours={folder}' --max-lora-rank 8"
    )
    assert made["llama.cpp"].splitlines() == [
        "hf download someone/small --local-dir mine-yours-base --revision v2",
        "python convert_hf_to_gguf.py mine-yours-base --outfile mine-yours-base.gguf",
        f"python convert_lora_to_gguf.py --base mine-yours-base --outfile mine-yours-lora.gguf '{folder}'",
        "llama-server -m mine-yours-base.gguf --lora mine-yours-lora.gguf",
    ]
    assert "'someone/small', dtype=torch.bfloat16, revision='v2', trust_remote_code=True" in made["PEFT"]


def test_commands_of_a_local_base_name_its_folder(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From whatever folder they are typed. A run's adapter is called as the run is."""
    (tmp_path / "run 7").mkdir()
    folder = by_hand(tmp_path / "run 7" / "adapter", {"q_proj": 4})
    monkeypatch.chdir(small_model.parent)
    made = commands(folder, plain(small_model.name))
    assert made["vLLM"] == (
        f"vllm serve {small_model} --enable-lora --lora-modules 'run-7={folder}' --max-lora-rank 8"
    )
    assert made["llama.cpp"].splitlines()[0] == (
        f"python convert_hf_to_gguf.py {small_model} --outfile run-7-base.gguf"
    )


def test_a_server_that_refuses_it_has_no_command(small_model: Path, tmp_path: Path):
    base = plain(small_model)
    for number, (options, servers) in enumerate(
        [
            ({}, ["PEFT", "vLLM", "llama.cpp"]),
            ({"use_rslora": True}, ["PEFT", "vLLM"]),
            ({"rank_pattern": {"v_proj": 2}}, ["PEFT", "llama.cpp"]),
            ({"use_dora": True}, ["PEFT"]),
        ]
    ):
        assert list(commands(by_peft(small_model, tmp_path / f"{number}", **options), base)) == servers


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_python_for_peft_gives_the_model_that_was_trained(
    small_model: Path, tmp_path: Path, quantization: Any
):
    folder = by_peft(small_model, tmp_path / "it's mine")
    AutoTokenizer.from_pretrained(str(small_model)).save_pretrained(str(folder))
    base = Base(str(small_model), quantization=quantization, compute_dtype="float32")
    made: dict[str, Any] = {}
    exec(commands(folder, base)["PEFT"], made)
    assert made["tokenizer"].chat_template == CHATML
    theirs, ours = made["model"], load_adapter(load_model(base), str(folder)).network
    seen = 0
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear):
            other = theirs.get_submodule(name)
            assert type(other) is type(module), name
            assert torch.equal(dequantized(other), dequantized(module)), name
            seen += 1
    assert seen == 2 * 7 + 1 + 4 * 2, "two layers, the head, and four pairs of factors"


# ---- the folder


@pytest.fixture(scope="module")
def trained(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(16)))
    recipe = Recipe(
        base=plain(small_model),
        data=Data(str(folder / "pairs.jsonl"), chat_template=CHATML + "{# mine #}"),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=4, max_steps=2, learning_rate=1e-2),
        run_directory=str(folder / "run"),
    )
    return train(recipe, quiet=True)


@pytest.mark.parametrize("as_source", [False, True])
def test_a_runs_adapter_leaves_to_the_byte_and_without_its_manifest(
    trained: RunDirectory, small_model: Path, tmp_path: Path, as_source: bool
):
    source = Source(trained.adapter_folder, plain(small_model), trained) if as_source else trained
    folder = export_adapter(source, tmp_path / "out")
    files = {file.name: file.read_bytes() for file in trained.adapter_folder.iterdir()}
    assert files.pop("manifest.json")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert {"trained_on.json", "chat_template.jinja", "tokenizer.json"} <= files.keys()
    found = {f.server: f for f in lint(folder, plain(small_model)) if f.severity != "note"}
    assert found.keys() == {"vLLM", "llama.cpp"}, "the template, and nothing else"


def test_an_adapter_that_is_not_as_the_run_wrote_it_does_not_leave(trained: RunDirectory, tmp_path: Path):
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    (run.adapter_folder / "trained_on.json").unlink()
    for source in (run, Source(run.adapter_folder, plain("x"), run)):
        with pytest.raises(RunError, match=r"not as the run wrote it: trained_on\.json is missing"):
            export_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_somebodys_folder_the_adapter_leaves_and_nothing_else(small_model: Path, tmp_path: Path):
    folder = by_peft(small_model, tmp_path / "theirs", name=None)
    for name in ("optimizer.pt", "training_args.bin", "notes.txt", "other.safetensors", "pickle.pkl"):
        (folder / name).write_bytes(b"\x80\x04.")
    (folder / "checkpoint-5").mkdir()
    out = export_adapter(Source(folder, Base(str(small_model), quantization="none")), tmp_path / "out")
    names = {file.name for file in out.iterdir()}
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert names - own == {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}, "the base's"
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (folder / weights).read_bytes()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == json.loads((folder / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(small_model)
    }
    network = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(network, str(out)).named_parameters())
    for name, tensor in load_file(folder / weights).items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


def test_what_a_config_says_of_its_base_stays(small_model: Path, tmp_path: Path):
    folder = by_peft(small_model, tmp_path / "theirs", name="someone/small")
    AutoTokenizer.from_pretrained(str(small_model)).save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")

    def exported(name: str, base: Base) -> dict[str, Any]:
        out = export_adapter(Source(folder, base), tmp_path / name)
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}", "its own tokenizer"
        config = json.loads((out / "adapter_config.json").read_text())
        return {key: config[key] for key in ("base_model_name_or_path", "revision")}

    told = {"base_model_name_or_path": "someone/small", "revision": None}
    assert exported("a", plain(small_model)) == told
    assert exported("b", replace(plain("someone/small"), revision="v2")) == told | {"revision": "v2"}
    changed(folder, revision="v1")
    assert exported("c", replace(plain("someone/small"), revision="v2")) == told | {"revision": "v1"}


def test_an_export_overwrites_nothing_and_leaves_nothing_half(small_model: Path, tmp_path: Path):
    folder = by_peft(small_model, tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="--output"):
        export_adapter(Source(folder, plain(small_model)), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]
    with pytest.raises(ModelError, match="someone/small cannot be loaded"):  # no tokenizer anywhere
        export_adapter(Source(folder, plain("someone/small")), tmp_path / "new")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled \.bin files are not opened"):
        export_adapter(Source(folder, plain(small_model)), tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "theirs"]
