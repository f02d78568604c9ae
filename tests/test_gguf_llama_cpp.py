"""GGUF files from llama.cpp's own converters, run in llama.cpp, against transformers: top-1, log-probs.

Marked llama_cpp, and skipped unless LLAMA_CPP names a checkout of llama.cpp and LLAMA_CPP_PYTHON an
interpreter with what its converters need and llama-cpp-python, whose source distribution has both.
The tokenizers are real ones, from the vocabularies that llama.cpp's checkout brings.

    LLAMA_CPP=… LLAMA_CPP_PYTHON=… pytest tests/test_gguf_llama_cpp.py -n0 -s
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CHATML, SHARED, build, llama_config
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizer_designs import LLAMA3
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, TokenizersBackend

from lora_dpo.errors import ModelError
from lora_dpo.export.gguf.converter import ADAPTERS, MODELS, find_converter
from lora_dpo.export.gguf.making import GgufExport, export_gguf, export_gguf_adapter
from lora_dpo.recipe import Base

gguf = pytest.importorskip("gguf", reason="takes the gguf package")
CHECKOUT, PYTHON = os.environ.get("LLAMA_CPP", ""), os.environ.get("LLAMA_CPP_PYTHON", "")
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="LLAMA_CPP, LLAMA_CPP_PYTHON name it"),
    # PEFT remarks on what these tests do on purpose: an adapter on a tied base, a merge.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

RUNNER = """
import json, sys
import numpy as np
from llama_cpp import Llama
job = json.load(open(sys.argv[1]))
model = Llama(job["model"], lora_path=job["lora"], n_ctx=512, logits_all=True, verbose=False, n_threads=1,
              type_k=job["cache"], type_v=job["cache"])
rows = []
for ids in job["ids"]:
    model.reset()
    model.eval(ids)
    rows.append(np.array(model.scores[: len(ids)]))
np.save(sys.argv[2], np.concatenate(rows))
"""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXTS = [
    "Is tea better than coffee? That depends on who drinks it, and when; 3,141 people were asked.",
    "The quick brown fox jumps over the lazy dog. Then it sleeps until the evening comes around again.",
    "Write a polite letter to a neighbour whose dog barks at night. Dear neighbour, I hope you are well.",
]


@dataclass(frozen=True)
class Case:
    """A base on disk, an adapter for it, and both merged in float32."""

    base: Path
    adapter: Path
    merged: Path
    converters: Path


def real_tokenizer(name: str) -> TokenizersBackend:
    """The tokenizer of a vocabulary in llama.cpp's checkout: qwen2 or llama-bpe."""
    reader = gguf.GGUFReader(Path(CHECKOUT) / "models" / f"ggml-vocab-{name}.gguf")
    tokens, kinds, merges = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type", "merges")
    )
    words = {token: n for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    core = Tokenizer(models.BPE(vocab=words, merges=pairs, ignore_merges=name == "llama-bpe"))
    pattern = Regex(LLAMA_WORDS if name == "llama-bpe" else QWEN_WORDS)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if name == "qwen2":
        made = TokenizersBackend(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        made.chat_template = CHATML
        return made
    bos = "<|begin_of_text|>"
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    made = TokenizersBackend(tokenizer_object=core, bos_token=bos, eos_token="<|eot_id|>")
    made.chat_template = LLAMA3
    return made


def make_case(folder: Path, network: Any, tokenizer: Any, **adapter: Any) -> Case:
    """Save a base, put a random adapter on it, and merge that in float32 with peft."""
    base, merged = folder / "base", folder / "merged"
    network.float().save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(2)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | adapter
    adapted: Any = get_peft_model(network, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    adapted.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    return Case(base, folder / "adapter", merged, Path(CHECKOUT))


def network_of(kind: str, rows: int) -> Any:
    torch.manual_seed(1)
    if kind == "llama":
        # Like Llama 3's: grouped heads, scaled RoPE, a head of its own.
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
        config = llama_config(vocab_size=rows, rope_parameters=rope, initializer_range=0.2)
        config.eos_token_id, config.bos_token_id = 128009, 128000
        return build(config)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = Qwen2Config(
        vocab_size=rows, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, **sizes
    )
    config.eos_token_id, config.bos_token_id = 151645, None
    network = build(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # they begin as zeros
                parameter.normal_(0, 0.5)
    return network


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(
        tmp_path_factory.mktemp("llama"), network_of("llama", 128256), real_tokenizer("llama-bpe")
    )


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """rsLoRA, ranks and alphas of single modules, and factors for the embeddings."""
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
    }
    tokenizer = real_tokenizer("llama-bpe")
    return make_case(tmp_path_factory.mktemp("unusual"), network_of("llama", 128256), tokenizer, **options)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("qwen2"), network_of("qwen2", 151936), real_tokenizer("qwen2"))


@pytest.fixture(scope="module")
def chat_10m(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The small chat model of ../shared, whose tokenizer is its own: llama.cpp's list gets a line for it."""
    source = SHARED / "models" / "chat-10m"
    if not source.is_dir():
        pytest.skip("../shared/models is not there")
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(source)
    case = make_case(folder, AutoModelForCausalLM.from_pretrained(source), tokenizer)
    return Case(case.base, case.adapter, case.merged, checkout_that_knows(tokenizer, folder / "llama.cpp"))


def checkout_that_knows(tokenizer: Any, folder: Path) -> Path:
    """A copy of the converters with a tokenizer's fingerprint added, as llama.cpp's own documents say."""
    for part in ("conversion", "gguf-py"):
        shutil.copytree(Path(CHECKOUT) / part, folder / part)
    for name in (MODELS, ADAPTERS):
        shutil.copy(Path(CHECKOUT) / name, folder / name)
    source = folder / "conversion" / "base.py"
    text = source.read_text(encoding="utf-8")
    probe = re.search(r"chktxt = ('.*')\n", text)
    assert probe is not None
    ids = tokenizer.encode(json.loads(json.dumps(eval(probe[1]))))
    known = f'        if chkhsh == "{sha256(str(ids).encode()).hexdigest()}":\n            res = "gpt-2"\n'
    source.write_text(
        text.replace("        res = None\n", f"        res = None\n{known}", 1), encoding="utf-8"
    )
    return folder


def sequences(case: Case) -> list[list[int]]:
    """Conversations and texts in the model's own tokens; 200 and more of them."""
    tokenizer = AutoTokenizer.from_pretrained(case.merged)
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1][:40]}]
        for text in TEXTS
    ]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    ids += [tokenizer(text).input_ids for text in TEXTS]
    assert sum(map(len, ids)) >= 200
    return ids


def in_transformers(network: Any, ids: list[list[int]]) -> torch.Tensor:
    """Log-probs [positions, vocabulary], float32."""
    network = network.float().eval()
    with torch.no_grad():
        logits = [network(input_ids=torch.tensor([row])).logits[0] for row in ids]
    return torch.log_softmax(torch.cat(logits), dim=-1)


def in_llama_cpp(
    folder: Path, model: Path, ids: list[list[int]], lora: Path | None = None, cache: int = 0
) -> torch.Tensor:
    """The same through llama.cpp. cache: 0 for keys and values in float32, 1 for its default, float16."""
    job = {"model": str(model), "lora": lora and str(lora), "ids": ids, "cache": cache}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", RUNNER, folder / "job.json", folder / "logits.npy"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.log_softmax(torch.from_numpy(np.load(folder / "logits.npy")), dim=-1)


def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(top-1 agreement, largest log-prob difference), printed too: over all tokens, and over likely ones."""
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    gap = (ours - theirs).abs()
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    print(
        f"\n{what}: {len(ours)} positions, top-1 {agreement:.4f}, largest |Δ log-prob| {gap.max():.2e}, mean"
        f" {gap.mean():.2e}, largest KL {kl.max():.2e}"
    )
    return agreement, gap.max().item()


def converted(case: Case, folder: Path, which: Path, dtype: Any = "float32") -> GgufExport:
    script = find_converter(case.converters, MODELS)
    return export_gguf(which, folder / f"{which.name}-{dtype}.gguf", dtype, script, python=PYTHON)


def clean(export: GgufExport) -> GgufExport:
    assert export.check is not None
    assert export.check.findings == []
    assert not export.check.shapes and not export.check.reordered, export.describe()
    print("\n" + "\n".join(export.describe()))
    return export


@pytest.mark.parametrize("name", ["llama", "qwen2", "chat_10m"])
def test_a_merged_model_in_gguf_is_the_model(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    case: Case = request.getfixturevalue(name)
    export = clean(converted(case, tmp_path, case.merged))
    ids = sequences(case)
    ours = in_transformers(AutoModelForCausalLM.from_pretrained(case.merged), ids)
    agreement, gap = compare(f"{name}, merged, f32", ours, in_llama_cpp(tmp_path, export.file, ids))
    assert agreement == 1.0 and gap < 1e-3
    compare(
        f"{name}, merged, f32, keys and values in f16",
        ours,
        in_llama_cpp(tmp_path, export.file, ids, cache=1),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "chat_10m", "unusual"])
def test_an_adapter_in_gguf_is_the_adapter(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    case: Case = request.getfixturevalue(name)
    base = clean(converted(case, tmp_path, case.base))
    script = find_converter(case.converters, ADAPTERS)
    described = Base(str(case.base), quantization="none")
    export = clean(export_gguf_adapter(case.adapter, described, tmp_path / "a.gguf", script, python=PYTHON))
    ids = sequences(case)
    plain = AutoModelForCausalLM.from_pretrained(case.base).float()
    untrained = in_transformers(plain, ids)
    ours = in_transformers(PeftModel.from_pretrained(plain, str(case.adapter)), ids)
    assert (ours - untrained).abs().max() > 0.1  # the adapter does something
    theirs = in_llama_cpp(tmp_path, base.file, ids, export.file)
    agreement, gap = compare(f"{name}, adapter, f32", ours, theirs)
    assert agreement == 1.0 and gap < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_the_source_rounded(chat_10m: Case, dtype: str, tmp_path: Path):
    clean(converted(chat_10m, tmp_path, chat_10m.merged, dtype))


def test_a_tokenizer_that_llama_cpp_does_not_know_is_an_error_in_words(chat_10m: Case, tmp_path: Path):
    script = find_converter(Path(CHECKOUT), MODELS)
    with pytest.raises(ModelError, match="fingerprint"):
        export_gguf(chat_10m.merged, tmp_path / "m.gguf", "float32", script, python=PYTHON)
    assert list(tmp_path.iterdir()) == []
