"""How an exported folder is loaded: the ways that apply to it, as commands to paste."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from lora_dpo.export.card.facts import Facts, number_of, text_of
from lora_dpo.export.card.markdown import code, fenced
from lora_dpo.export.card.names import last_part
from lora_dpo.export.serving.served import VLLM_RANKS

TEMPLATE = "chat_template.jinja"
PLACE_OF_BASE = "path/to/the/base"
BASE_GGUF = "# base.gguf: the base, converted to GGUF"
ASK = """
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
CONTINUE = """
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0], skip_special_tokens=True))
"""

REWARD = """
messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt").to(model.device)
print(model(**inputs).logits.item())
"""
POOLED = (
    "The reward is that of the last token which isn't the `pad_token_id` of the base's config. Where you set"
    " one to run batches, take a token that ends no conversation. The score head is not quantized:"
    " transformers leaves a model's last module alone, and `llm_int8_skip_modules` of your own must name"
    " `score`."
)


def usage(facts: Facts) -> str:
    """The section with the commands."""
    parts = ["## How to use it", _where(facts)]
    ways = {
        "adapter": _adapter,
        "merged": _merged,
        "gguf": _gguf,
        "gguf-adapter": _gguf_adapter,
        "ollama": _ollama,
    }
    return "\n\n".join([part for part in parts if part] + ways[facts.kind](facts))


def _where(facts: Facts) -> str:
    """What the commands take for granted."""
    if facts.repository is not None and facts.kind in ("adapter", "merged"):
        said = "llama.cpp's converters and Ollama read a downloaded copy:"
        command = f"hf download {shlex.quote(facts.repository)} --local-dir . # then run them in that folder"
        return f"{said}\n\n{fenced(command, 'bash')}{_base_note(facts)}"
    return f"Run in this folder.{_base_note(facts)}"


def _base_note(facts: Facts) -> str:
    if not facts.is_adapter or facts.base_id is not None:
        return ""
    return f" The base was a local folder, {code(facts.base_name)}: put its place for `{PLACE_OF_BASE}`."


def _adapter(facts: Facts) -> list[str]:
    if facts.is_reward:
        return ["**transformers and PEFT**", fenced(_peft(facts), "python"), POOLED]
    plain = not_plain(facts.adapter)
    parts = ["**transformers and PEFT**", fenced(_peft(facts), "python")]
    if plain:
        elsewhere = "`lora-dpo export RUN --to merged` makes a model that all take"
        return [
            *parts,
            f"This adapter {plain}, which vLLM, llama.cpp and Ollama refuse or compute otherwise, some for"
            f" some architectures only: {elsewhere}.",
        ]
    parts += ["**vLLM**", fenced(_vllm_adapter(facts), "bash")]
    unscaled = facts.adapter.get("use_rslora") is True
    if unscaled:
        return [
            *parts,
            "llama.cpp's converter leaves rsLoRA's scaling out: export with `--to gguf-adapter` instead.",
        ]
    template = [option] if (option := _own_template(facts, "--jinja --chat-template-file")) else []
    convert = [
        f"python llama.cpp/convert_lora_to_gguf.py . {_base_option(facts)} --outtype f32"
        " --outfile adapter.gguf",
        " ".join(["llama-cli -m base.gguf --lora adapter.gguf", *template, BASE_GGUF]),
    ]
    return [
        *parts,
        "**llama.cpp**",
        fenced("\n".join(convert), "bash"),
        "**Ollama**, with the two files of llama.cpp",
        fenced(_ollama_create(facts, "FROM ./base.gguf", "ADAPTER ./adapter.gguf"), "bash"),
    ]


def not_plain(adapter: Mapping[str, Any]) -> str | None:
    """In words what an adapter has beyond LoRA's products, which servers and converters don't load or, worse,
    leave out; None for a plain one.
    """
    kinds = {
        "use_dora": "is a DoRA",
        "modules_to_save": "holds whole modules",
        "trainable_token_indices": "holds trained tokens",
        "target_parameters": "changes experts",
        "rank_pattern": "has several ranks",
        "alpha_pattern": "has several alphas",
        "fan_in_fan_out": "sits on transposed weights",
    }
    found = [said for key, said in kinds.items() if adapter.get(key)]
    targets = adapter.get("target_modules")
    if isinstance(targets, list) and {"lm_head", "embed_tokens", "wte"} & {str(name) for name in targets}:
        found.append("changes embeddings or head")
    return " and ".join(found) or None


def _base_reference(facts: Facts) -> str:
    return facts.base_id or PLACE_OF_BASE


def _revision(facts: Facts) -> str | None:
    return (facts.commit or facts.base.revision) if facts.base_id is not None else None


def _base_option(facts: Facts) -> str:
    """Where llama.cpp's converter finds the base's config."""
    option = "--base-model-id" if facts.base_id is not None else "--base"
    return f"{option} {shlex.quote(_base_reference(facts))}"


def _place(facts: Facts) -> str:
    """The exported folder, or its repository, as transformers and vLLM name it."""
    return facts.repository or "."


def quoted(text: str) -> str:
    """A Python string."""
    return json.dumps(text, ensure_ascii=False)


def _options(facts: Facts) -> str:
    """What from_pretrained of the base is given, so that it is the base that was trained on."""
    options = [] if (revision := _revision(facts)) is None else [f"revision={quoted(revision)}"]
    if facts.base.trust_remote_code:
        options.append("trust_remote_code=True")
    return "".join(f", {option}" for option in options)


def _peft(facts: Facts) -> str:
    kind = facts.quantization
    compute = text_of(facts.trained_on.get("compute_dtype")) or facts.base.compute_dtype
    compute = "bfloat16" if compute == "auto" else compute
    double = _double(facts)
    quantization = {
        "int8": "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
        "none": "None",
    }.get(
        kind,
        "BitsAndBytesConfig(\n"
        f"    load_in_4bit=True, bnb_4bit_quant_type={quoted(kind)}, bnb_4bit_use_double_quant={double},\n"
        f"    bnb_4bit_compute_dtype={quoted(compute)},\n"
        ")",
    )
    bnb = "" if kind == "none" else ", BitsAndBytesConfig"
    ask = REWARD if facts.is_reward else _ask(facts)
    auto = "AutoModelForSequenceClassification" if facts.is_reward else "AutoModelForCausalLM"
    labels = ", num_labels=1" if facts.is_reward else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer{bnb}\n\n"
        f"quantization = {quantization}\n"
        f"base = {auto}.from_pretrained(\n"
        f"    {quoted(_base_reference(facts))}{labels}{_options(facts)}, dtype={quoted(compute)},\n"
        '    quantization_config=quantization, device_map="auto",\n'
        ")\n"
        f"model = PeftModel.from_pretrained(base, {quoted(_place(facts))})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted(_place(facts))})\n{ask}"
    ).rstrip()


def _double(facts: Facts) -> bool:
    return facts.trained_on.get("double_quantization", facts.base.double_quantization) is True


def _own_template(facts: Facts, option: str) -> str:
    """How a server is given the chat template, where training had another than the base's."""
    own = facts.recipe is not None and facts.recipe.data.chat_template is not None
    return f"{option} {TEMPLATE}" if own and (facts.folder / TEMPLATE).is_file() else ""


def _ask(facts: Facts) -> str:
    """A first question, by the chat template where there is one."""
    names = (TEMPLATE, "chat_template.json")
    chats = any((facts.folder / name).is_file() for name in names)
    config = facts.folder / "tokenizer_config.json"
    chats = chats or (config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8"))
    return ASK if chats else CONTINUE


def _vllm_adapter(facts: Facts) -> str:
    rank = int(number_of(facts.adapter.get("r")) or 0)
    needed = next((size for size in VLLM_RANKS if size >= rank), rank)
    words = ["vllm", "serve", shlex.quote(_base_reference(facts))]
    if (revision := _revision(facts)) is not None:
        words += ["--revision", shlex.quote(revision)]
    if facts.quantization == "nf4" and _double(facts):  # what vLLM makes of a 16-bit base
        words.append("--quantization bitsandbytes")
    words += ["--enable-lora", f"--max-lora-rank {needed}" if needed > 16 else ""]
    words.append(f"--lora-modules {shlex.quote(f'{short_name(facts)}={_place(facts)}')}")
    words.append(_own_template(facts, "--chat-template"))
    words.append("--trust-remote-code" if facts.base.trust_remote_code else "")
    return " ".join(word for word in words if word)


def _merged(facts: Facts) -> list[str]:
    place = quoted(_place(facts))
    trust = ", trust_remote_code=True" if facts.base.trust_remote_code else ""
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto", device_map="auto"{trust})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n{_ask(facts)}"
    ).rstrip()
    serve = f"vllm serve {shlex.quote(_place(facts))} --served-model-name {shlex.quote(short_name(facts))}"
    convert = "python llama.cpp/convert_hf_to_gguf.py . --outfile model.gguf --outtype auto"
    return [
        "**transformers**",
        fenced(load, "python"),
        "**vLLM**",
        fenced(serve, "bash"),
        "**llama.cpp**",
        fenced(f"{convert}\nllama-cli -m model.gguf", "bash"),
        "**Ollama**, with the file of llama.cpp",
        fenced(_ollama_create(facts, "FROM ./model.gguf"), "bash"),
    ]


def _gguf_files(facts: Facts, default: str) -> str:
    return next((file.name for file in sorted(facts.folder.glob("*.gguf"))), default)


def _gguf(facts: Facts) -> list[str]:
    file = _gguf_files(facts, "model.gguf")
    run = f"llama-cli -m {shlex.quote(f'./{file}')}\nllama-server -m {shlex.quote(f'./{file}')}"
    return [
        "**llama.cpp**",
        fenced(run, "bash"),
        "**Ollama**",
        fenced(_ollama_create(facts, f"FROM ./{file}"), "bash"),
    ]


def _gguf_adapter(facts: Facts) -> list[str]:
    file = _gguf_files(facts, "adapter.gguf")
    run = f"llama-cli -m base.gguf --lora {shlex.quote(f'./{file}')} {BASE_GGUF}"
    return [
        "**llama.cpp**",
        fenced(run, "bash"),
        "**Ollama**",
        fenced(_ollama_create(facts, "FROM ./base.gguf", f"ADAPTER ./{file}"), "bash"),
    ]


def _ollama(facts: Facts) -> list[str]:
    name = short_name(facts)
    return ["**Ollama**", fenced(f"ollama create {name} -f Modelfile\nollama run {name}", "bash")]


def _ollama_create(facts: Facts, *lines: str) -> str:
    name = short_name(facts)
    written = " ".join(shlex.quote(line) for line in lines)
    return f"printf '%s\\n' {written} > Modelfile\nollama create {name} -f Modelfile\nollama run {name}"


def short_name(facts: Facts) -> str:
    """What servers call the model: letters, digits, dots and dashes."""
    objective = "tuned" if facts.recipe is None else type(facts.recipe.loss).__name__
    words = re.sub(r"[^a-z0-9.]+", "-", f"{last_part(facts.base_name)}-{objective}".lower())
    return words.strip("-.") or "tuned"
