"""The commands that serve an adapter, as they are to be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lora_dpo.export.serving.linter import Server, findings_on
from lora_dpo.export.serving.served import TEMPLATE, Served, look_at
from lora_dpo.recipe import Base


def commands(adapter: Path, base: Base) -> dict[Server, str]:
    """For each server that takes the adapter on this base: its command lines, and Python for PEFT.

    adapter: its folder. A server that refuses it whatever the options, or would compute something else, is
    left out: `lint` says why. Raises ModelError where it is no LoRA adapter.
    """
    adapter = adapter.resolve()
    seen = look_at(adapter, base)
    name = served_name(adapter)
    made: dict[Server, str] = {"PEFT": _peft(seen)}
    barred = {f.server for f in findings_on(seen) if f.severity in ("refused", "wrong") and not f.option}
    if not barred & {"vLLM", "all"}:
        made["vLLM"] = _vllm(seen, name)
    if not barred & {"llama.cpp", "all"}:
        made["llama.cpp"] = _llama_cpp(seen, name)
    return made


def served_name(adapter: Path) -> str:
    """What the adapter is called when it is asked for: its folder's name, or its run's."""
    own = adapter.parent.name if adapter.name in ("adapter", "export-adapter") else adapter.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-.") or "adapter"


def _vllm(seen: Served, name: str) -> str:
    base = seen.base
    words = ["vllm", "serve", _place(base)]
    words += ["--revision", base.revision] if base.revision else []
    words += ["--trust-remote-code"] if base.trust_remote_code else []
    words += ["--quantization", "bitsandbytes"] if seen.quantized_alike else []
    words += ["--enable-lora", "--lora-modules", f"{name}={seen.folder}"]
    words += ["--max-lora-rank", str(seen.serving_rank)]
    if seen.other_template:
        words += ["--chat-template", str(seen.folder / TEMPLATE)]
    return shlex.join(words)


def _llama_cpp(seen: Served, name: str) -> str:
    base, folder = seen.base, _place(seen.base)
    lines = []
    if not Path(folder).is_dir():
        folder = f"{name}-base"
        fetch = ["hf", "download", base.model, "--local-dir", folder]
        lines.append([*fetch, *(["--revision", base.revision] if base.revision else [])])
    model, lora = f"{name}-base.gguf", f"{name}-lora.gguf"
    lines.append(["python", "convert_hf_to_gguf.py", folder, "--outfile", model])
    convert = ["python", "convert_lora_to_gguf.py", "--base", folder, "--outfile", lora, str(seen.folder)]
    serve = ["llama-server", "-m", model, "--lora", lora]
    if seen.other_template:
        serve += ["--jinja", "--chat-template-file", str(seen.folder / TEMPLATE)]
    return "\n".join(shlex.join(line) for line in [*lines, convert, serve])


def _place(base: Base) -> str:
    """A local base by its absolute path, another by its id."""
    folder = Path(base.model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base.model


def sequence_classifier(adapter: Path, base: Base) -> str:
    """Python that loads a reward model's adapter, and what must not be quantized then."""
    tokenizer = adapter if (adapter / "tokenizer_config.json").is_file() else _place(base)
    lines = _loading("AutoModelForSequenceClassification", base, adapter, tokenizer, ["num_labels=1"])
    if base.quantization != "none":
        lines += SCORE_NOTE
    return "\n".join(lines)


SCORE_NOTE = [
    "# The score head stays unquantized: transformers keeps a model's last module so by itself. Where you",
    '# give llm_int8_skip_modules of your own, name "score" among them.',
]


def _peft(seen: Served) -> str:
    return "\n".join(_loading("AutoModelForCausalLM", seen.base, seen.folder, _tokenizer(seen), []))


def _loading(auto: str, base: Base, adapter: Path, tokenizer: Path | str, options: list[str]) -> list[str]:
    dtype = "bfloat16" if base.compute_dtype == "auto" else base.compute_dtype
    options = [repr(_place(base)), *options, f"dtype=torch.{dtype}"]
    options += [f"revision={base.revision!r}"] if base.revision else []
    options += ["trust_remote_code=True"] if base.trust_remote_code else []
    quantized = _quantization(base, dtype)
    options += [f"quantization_config={quantized}"] if quantized else []
    imports = f"{auto}, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {imports}",
        "",
        f"base = {auto}.from_pretrained({', '.join(options)})",
        f"model = PeftModel.from_pretrained(base, {str(adapter)!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(tokenizer)!r})",
    ]


def _tokenizer(seen: Served) -> Path | str:
    """Where the tokenizer is: with the adapter, or with the base."""
    there = (seen.folder / "tokenizer_config.json").is_file()
    return seen.folder if there else _place(seen.base)


def _quantization(base: Base, dtype: str) -> str | None:
    """How the base was quantized, as transformers takes it."""
    if base.quantization == "none":
        return None
    if base.quantization == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    kind, double = base.quantization, base.double_quantization
    return (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r},"
        f" bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.{dtype})"
    )
