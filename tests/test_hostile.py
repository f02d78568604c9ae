"""A stranger's files run no code, reach no network and no file elsewhere, and end in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CHATML, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_dpo.attention import NAME
from lora_dpo.errors import DataError, ModelError, RecipeError
from lora_dpo.model import load_model
from lora_dpo.model.adapter_config import lora_config
from lora_dpo.model.loading import load_adapter
from lora_dpo.model.saved import write_adapter
from lora_dpo.recipe import Adapter, Base, load_recipe
from lora_dpo.tokenization import ChatTokenizer

MARKER = "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\nraise SystemExit\n"


@pytest.fixture(scope="module")
def adapter(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small adapter as it should be."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(plain(small_model), Adapter(rank=2, targets=("q_proj", "v_proj")))
    write_adapter(model.network, "default", folder)  # pyright: ignore[reportArgumentType]
    return folder


def plain(folder: Path, **changes: Any) -> Base:
    return Base(str(folder), quantization="none", compute_dtype="float32", **changes)


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of a folder with keys of a JSON file set."""
    copy = shutil.copytree(folder, to)
    old = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(old | values))
    return copy


# --- Code and network -------------------------------------------------------------------------------------

SCRIPT = """
import json, os, socket, sys
asked = []
def refuse(*address, **_):
    asked.append(repr(address)); raise OSError('no network')
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
from lora_dpo.errors import ModelError
from lora_dpo.model import load_model
from lora_dpo.recipe import Adapter, Base
said = {}
for name in json.loads(sys.argv[1]):
    inner = os.path.join(name, 'adapter')
    adapter = Adapter(start_from=inner) if os.path.isdir(inner) else None
    try:
        model = load_model(Base(name, quantization='none', compute_dtype='float32', device='cpu'), adapter)
        said[os.path.basename(name)] = 'loaded with ' + model.causal.config._attn_implementation
    except ModelError as error:
        said[os.path.basename(name)] = str(error)
print(json.dumps({'said': said, 'asked': asked}))
"""

REMOTE = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": ["tokenization_x.XTokenizer", None],
}
HINTED: dict[str, dict[str, dict[str, Any]]] = {
    "auto_map": {
        "config.json": {"auto_map": REMOTE},
        "tokenizer_config.json": {"auto_map": REMOTE},
        "generation_config.json": {"custom_generate": "org/repo"},
    },
    "tokenizer": {"tokenizer_config.json": {"auto_map": REMOTE, "tokenizer_class": "XTokenizer"}},
    "unknown": {"config.json": {"auto_map": REMOTE, "model_type": "x"}},
    "elsewhere": {
        "config.json": {
            "auto_map": {name: f"org/repo--{place}" for name, place in REMOTE.items()},
            "_name_or_path": "org/repo",
            "_experts_implementation": "org/repo",
            "use_kernels": True,
        }
    },
    "kernel": {"config.json": {"attn_implementation": "org/repo", "_attn_implementation": "org/repo:f"}},
    "flash": {
        "config.json": {"attn_implementation": "flash_attention_2", "kernel_config": {"RMSNorm": "org/r:f"}}
    },
    "quantized": {"config.json": {"quantization_config": {"quant_method": "x", "modules": ["os"]}}},
    "adapter-elsewhere": {},
}


def test_no_hint_of_a_stranger_runs_code_or_asks_the_network(
    small_model: Path, adapter: Path, tmp_path: Path
):
    """With modules in the folder that tell of their import, a package `kernels` that does, and no network."""
    folders = []
    for name, files in HINTED.items():
        folder = shutil.copytree(small_model, tmp_path / name)
        for file, values in files.items():
            old = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            (folder / file).write_text(json.dumps(old | values))
        for module in ("configuration_x", "modeling_x", "tokenization_x", "custom_generate/generate"):
            (folder / f"{module}.py").parent.mkdir(exist_ok=True)
            (folder / f"{module}.py").write_text(MARKER)
        folders.append(str(folder))
    values = {
        "base_model_name_or_path": "https://example.com/org/repo",
        "auto_mapping": {"base_model_class": "X", "parent_library": "modeling_x"},
        "megatron_config": {"x": 1},
        "megatron_core": "modeling_x",
        "revision": "evil",
    }
    changed(adapter, tmp_path / "adapter-elsewhere" / "adapter", "adapter_config.json", **values)
    packages = tmp_path / "packages"
    (packages / "kernels").mkdir(parents=True)
    (packages / "kernels" / "__init__.py").write_text(MARKER)
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = f"{packages}:{Path(__file__).parents[1]}"
    environment["HF_HOME"] = str(tmp_path / "hub")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(folders)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["asked"] == []
    assert not list(tmp_path.rglob("it_ran"))
    refused = {name: text for name, text in found["said"].items() if not text.startswith("loaded with")}
    assert set(refused) == {"unknown", "tokenizer", "quantized"}, refused
    for name in ("unknown", "tokenizer"):
        assert "read that code, then set base.trust_remote_code=true" in refused[name]
    assert "quantized with x" in refused["quantized"]
    assert {found["said"][name] for name in HINTED if name not in refused} == {f"loaded with {NAME}"}


# --- A base's files ---------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_in_words(small_model: Path, tmp_path: Path):
    folder = shutil.copytree(small_model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'touch it_ran'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which is pickled and could run code"):
        load_model(plain(folder))


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/x.safetensors", "a.bin", "", "..", 7, ["a"]]
)
def test_shards_lie_beside_their_index(small_model: Path, tmp_path: Path, name: object):
    folder = shutil.copytree(small_model, tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json names .*\.safetensors files beside it"):
        load_model(plain(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 1e300},
        {"vocab_size": 2**24},
        {"num_attention_heads": float("nan")},
        {"hidden_size": "wide"},
        {"hidden_size": -64},
        {"num_hidden_layers": None},
        {"model_type": ["llama"]},
        {"transformers_weights": "../adapter_model.bin"},
        {"transformers_weights": "adapter_model.bin"},
        {"quantization_config": "x"},
        {"quantization_config": [1]},
        {"architectures": 7, "model_type": "no such"},
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_in_words(small_model: Path, tmp_path: Path, values: dict[str, Any]):
    folder = changed(small_model, tmp_path / "m", "config.json", **values)
    with pytest.raises(ModelError, match=r"base\.model"):
        load_model(plain(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["", "[1]", "{" * 99_999, '{"a":' * 3000, "\x00", '"x"', "null"], ids=range(7)
)
def test_files_that_hold_something_else_are_refused_in_words(
    small_model: Path, tmp_path: Path, file: str, text: str
):
    folder = shutil.copytree(small_model, tmp_path / "m")
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=r"base\.model"):
        load_model(plain(folder))


def test_weights_that_lack_a_tensor_are_not_made_up(small_model: Path, tmp_path: Path):
    folder = shutil.copytree(small_model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack .*q_proj"):
        load_model(plain(folder))


def test_a_folder_with_an_adapter_is_no_base(small_model: Path, adapter: Path, tmp_path: Path):
    folder = shutil.copytree(small_model, tmp_path / "m")
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(ModelError, match="holds an adapter: give the model under it"):
        load_model(plain(folder))


# --- An adapter's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9},
        {"r": 60_000},
        {"r": -1},
        {"r": 0},
        {"r": True},
        {"r": "2"},
        {"r": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300},
        {"lora_alpha": [1]},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {"q_proj": 60_000}},
        {"rank_pattern": {"(a+)+$": 2}},
        {"rank_pattern": 3},
        {"target_modules": "(a+)+$"},
        {"target_modules": "(a|a)*$"},
        {"target_modules": "((.*)*)*x"},
        {"target_modules": ".*" * 20 + "x"},
        {"target_modules": "("},
        {"target_modules": 7},
        {"target_modules": ["q_proj", 7]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": "no such"},
        {"exclude_modules": "(.*a){30}"},
        {"modules_to_save": "lm_head"},
        {"trainable_token_indices": [10**12]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": [319]},
        {"layers_to_transform": "0"},
        {"peft_type": "EVIL"},
        {"peft_type": ["LORA"]},
        {"peft_type": None},
        {"task_type": {"a": 1}},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"use_dora": "yes"},
    ],
    ids=str,
)
def test_an_impossible_adapter_config_is_refused_in_words(
    small_model: Path, adapter: Path, tmp_path: Path, values: dict[str, Any]
):
    folder = changed(adapter, tmp_path / "a", "adapter_config.json", **values)
    with pytest.raises(ModelError, match="the adapter"):
        load_adapter(load_model(plain(small_model)), str(folder))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{" * 99_999, '{"a":' * 9999, "null", "\x00", "\ud800".encode("utf-8", "surrogatepass")],
    ids=range(7),
)
def test_an_adapter_config_that_is_none_is_refused_in_words(adapter: Path, tmp_path: Path, text: str | bytes):
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)$",
        r"^(?!.*lm_head).*(?:q_proj|k_proj|v_proj)",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|gate_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|gate_proj)))",
        r"model\.layers\.(0|1|2)\.mlp\.(up|down)_proj",
    ],
)
def test_patterns_that_are_in_use_are_taken(pattern: str):
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": pattern}
    assert lora_config(values, "the adapter").target_modules == pattern


def read(folder: Path):
    from lora_dpo.model.saved import read_adapter

    return read_adapter(str(folder), "adapter.start_from")


def header(text: str | bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (4, 4), offsets: object = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "empty file": b"",
    "length beyond the file": header("{}", 10**6),
    "length 2**63": header("{}", 2**63),
    "length 2**64 - 1": header("{}", 2**64 - 1),
    "no JSON": header("{{{{"),
    "deep JSON": header('{"a":' * 9999),
    "a list": header("[]"),
    "overlapping": header(json.dumps({"a": entry(), "b": entry(offsets=(32, 96))}), data=b"\0" * 96),
    "huge shape": header(json.dumps({"a": entry(shape=(2**40, 2**40))})),
    "shape that overflows": header(json.dumps({"a": entry(shape=(2**32, 2**32, 0))})),
    "negative shape": header(json.dumps({"a": entry(shape=(-4, -4))})),
    "offsets beyond": header(json.dumps({"a": entry(offsets=(0, 10**12))})),
    "offsets turned round": header(json.dumps({"a": entry(offsets=(64, 0))})),
    "dtype junk": header(json.dumps({"a": entry(dtype="PICKLE")})),
    "dtype a number": header(json.dumps({"a": entry(dtype=7)})),
    "integers": header(json.dumps({"a": entry(dtype="I32")})),
    "not a number": header(json.dumps({"a": entry()}), data=b"\xff" * 64),
    "not UTF-8": header(b'{"\xff\xfe": 1}'),
    "trailing bytes": header(json.dumps({"a": entry()}), data=b"\0" * 99),
    "names twice": header(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_file_is_refused_in_words(
    small_model: Path, adapter: Path, tmp_path: Path, name: str
):
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors|the adapter in"):
        load_adapter(load_model(plain(small_model)), str(folder))
    base = shutil.copytree(small_model, tmp_path / "m")
    (base / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ModelError, match=r"base\.model"):
        load_model(plain(base))


# --- Fuzz -------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("LORA_DPO_HOSTILE_EXAMPLES", "40"))
"""More: LORA_DPO_HOSTILE_EXAMPLES=5000 pytest tests/test_hostile.py -k bytes"""


@pytest.mark.parametrize(
    "file",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    ],
)
def test_changed_bytes_load_or_are_refused(small_model: Path, adapter: Path, tmp_path: Path, file: str):
    of_adapter = file.startswith("adapter")
    folder = shutil.copytree(adapter if of_adapter else small_model, tmp_path / "x")
    whole = (folder / file).read_bytes()
    model = load_model(plain(small_model)) if of_adapter else None
    near = min(len(whole), 4000)
    changes = st.tuples(st.integers(0, near - 1), st.binary(max_size=6), st.integers(0, 12))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.lists(changes, min_size=1, max_size=4))
    def check(mutations: list[tuple[int, bytes, int]]) -> None:
        data = whole
        for at, new, gone in mutations:
            data = data[:at] + new + data[at + gone :]
        (folder / file).write_bytes(data)
        try:
            if model is not None:
                read(folder)
            else:
                load_model(plain(folder))
        except (ModelError, RecipeError) as error:
            assert len(str(error)) < 5000

    check()


# --- Recipes ----------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "python object": "base: !!python/object/apply:os.system ['touch it_ran']",
    "python name": "base: !!python/name:os.system",
    "billion laughs": LAUGHS,
    "inside itself": "base: &a {model: *a}",
    "deep": "[" * 5000,
    "deep flow": "base: " + "{a: " * 3000,
    "bad date": "base: {model: 2001-99-99}",
    "digits": "training: {seed: " + "9" * 9999 + "}",
    "laughs in text": json.dumps(
        {"base": {"model": "m"}, "data": {"train": "[&a [x,x,x], " + "*a," * 26_000 + "]"}}
    ),
    "null bytes": "base: \0",
    "long": "# " + "x" * 2**22,
    "other tag": "base: !x 1",
    "unhashable": "{[a]: b}: c",
    "not a mapping": "7",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_hostile_recipe_is_refused_in_words(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(YAMLS[name])
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 3000
    assert not (tmp_path / "it_ran").exists()


def test_aliases_that_are_few_are_taken(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base: {model: m}\ndata: {train: &t [a.jsonl, b.jsonl], eval: *t}\n")
    assert load_recipe(file).data.eval == ("a.jsonl", "b.jsonl")


# --- Chat templates ---------------------------------------------------------------------------------------

TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch it_ran') }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'].popen('touch it_ran').read() }}",
    "{% for x in range(1000000000) %}x{% endfor %}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception('no') }}",
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ missing.of.this }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_template_runs_in_the_sandbox_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
):
    monkeypatch.chdir(tmp_path)
    chat = ChatTokenizer(small_tokenizer(), "{{ '' }}" + template, 1000)
    with pytest.raises((DataError, ModelError), match="the chat template refuses this conversation"):
        chat.prompt_ids([{"role": "user", "content": "Hi"}])
    assert not (tmp_path / "it_ran").exists()


def test_templates_render_in_transformers_sandbox(monkeypatch: pytest.MonkeyPatch):
    """Every rendering compiles in jinja2's immutable sandbox, and in no other environment."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    seen: list[type] = []
    original: Callable[..., Any] = jinja2.Environment.compile

    def compile(self: jinja2.Environment, *arguments: Any, **options: Any) -> Any:
        seen.append(type(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", compile)
    chat_template_utils._compile_jinja_template.cache_clear()
    chat = ChatTokenizer(small_tokenizer(), CHATML + "{# another text #}", 1000)
    assert len(chat.prompt_ids([{"role": "user", "content": "Hi"}]))
    assert seen and all(issubclass(kind, ImmutableSandboxedEnvironment) for kind in seen)


def test_tensors_of_a_checkpoint_that_is_pickled_are_not_opened(adapter: Path, tmp_path: Path):
    folder = shutil.copytree(adapter, tmp_path / "a")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled \.bin files are not opened"):
        read(folder)
