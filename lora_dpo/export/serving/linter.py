"""What a server will choke on in an adapter, or load and compute otherwise, and what to do about it.

Read from vLLM's sources (0.10 to 0.15: `lora/peft_helper.py`, `lora/utils.py`, `config/lora.py`) and from
llama.cpp's (`convert_lora_to_gguf.py`, `src/llama-adapter.cpp`). Only what applies to this adapter is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft.utils.other import get_pattern_key

from lora_dpo.export.serving.served import ENDINGS, TEMPLATE, VLLM_RANKS, Served, look_at
from lora_dpo.model.saved import CONFIG
from lora_dpo.recipe import Base

Server = Literal["vLLM", "llama.cpp", "PEFT", "all"]
Severity = Literal["refused", "wrong", "maybe", "note"]

VLLM_DEFAULT_RANK = 16
LARGE = 2**28
"""Bytes of factors from which it is said that half as many would do."""

MERGED = "lora-dpo export RUN --to merged makes a whole model, which every server takes"


@dataclass(frozen=True)
class Finding:
    """server: whom it concerns. severity: "refused" by the server, loaded but "wrong", "maybe" refused, or a
    "note". what: the fact. remedy: what to do. option: whether that is an option of the server, which its
    command then has.
    """

    server: Server
    severity: Severity
    what: str
    remedy: str
    option: bool = False

    def __str__(self) -> str:
        return f"{self.server}: {self.severity}: {self.what}. {self.remedy}"


def lint(adapter: Path, base: Base) -> list[Finding]:
    """What servers will not do as this adapter needs it, the worst first.

    adapter: its folder, in PEFT's layout. base: what it is served on. Raises ModelError where it is no LoRA
    adapter. Of a base whose files are not here nothing is said that depends on them.
    """
    return findings_on(look_at(adapter, base))


def findings_on(seen: Served) -> list[Finding]:
    """The same, of an adapter that was looked at."""
    found = [finding for check in CHECKS for finding in check(seen)]
    order = ("refused", "wrong", "maybe", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _rank(seen: Served) -> Iterator[Finding]:
    if seen.largest_rank <= VLLM_DEFAULT_RANK:
        return
    what = f"rank {seen.largest_rank} is above --max-lora-rank, which is {VLLM_DEFAULT_RANK} by default"
    if seen.serving_rank is None:
        yield Finding("vLLM", "refused", f"{what} and {VLLM_RANKS[-1]} at most", MERGED)
    else:
        remedy = f"Give vllm serve --max-lora-rank {seen.serving_rank}"
        yield Finding("vLLM", "refused", what, remedy, option=True)


def _scaling(seen: Served) -> Iterator[Finding]:
    """alpha / rank, where a server takes another alpha or rank than PEFT does."""
    config = seen.config
    root = math.sqrt if config.use_rslora else float
    pattern = config.alpha_pattern or {}
    alphas = {m: pattern.get(get_pattern_key(list(pattern), m), config.lora_alpha) for m in seen.ranks}
    true = {module: alphas[module] / root(rank) for module, rank in seen.ranks.items()}
    vllm = dict.fromkeys(true, config.lora_alpha / root(config.r))
    why = "it takes one rank and one alpha for all modules (r and lora_alpha)"
    yield from _wrongly_scaled("vLLM", true, vllm, why, MERGED)
    llama = {module: config.lora_alpha / rank for module, rank in seen.ranks.items()}
    why = "it scales by lora_alpha / rank, whatever use_rslora and alpha_pattern say"
    remedy = "lora-dpo export RUN --to gguf-adapter puts the scale where llama.cpp looks for it"
    yield from _wrongly_scaled("llama.cpp", true, llama, why, remedy)


def _wrongly_scaled(
    server: Server, true: dict[str, float], taken: dict[str, float], why: str, remedy: str
) -> Iterator[Finding]:
    wrong = [module for module in true if not math.isclose(true[module], taken[module], rel_tol=1e-6)]
    if wrong:
        first = wrong[0]
        example = f"{first} by {taken[first]:g} instead of {true[first]:g}"
        what = f"{why}: {len(wrong)} of {len(true)} modules would be scaled wrongly, {example}"
        yield Finding(server, "wrong", what, remedy)


def _saved_modules(seen: Served) -> Iterator[Finding]:
    names = seen.config.modules_to_save
    if not names:
        return
    what = f"whole modules lie beside the factors (modules_to_save: {', '.join(sorted(names))})"
    yield Finding("vLLM", "refused", what, MERGED)
    whole = [tensor.name for tensor in seen.tensors if not tensor.name.endswith(ENDINGS)]
    # The converter passes these on, and llama.cpp leaves them out without a word.
    if whole and all("_layernorm" in name or ".norm" in name for name in whole):
        yield Finding("llama.cpp", "wrong", f"{what}, and norms are left out there", MERGED)
    else:
        yield Finding("llama.cpp", "refused", what, MERGED)


def _tokens(seen: Served) -> Iterator[Finding]:
    if seen.config.trainable_token_indices:
        yield from _neither("single tokens' embeddings were trained (trainable_token_indices)")


def _dora(seen: Served) -> Iterator[Finding]:
    if seen.config.use_dora:
        yield from _neither("it is a DoRA (use_dora), and plain LoRA is taken")


def _neither(what: str) -> Iterator[Finding]:
    yield Finding("vLLM", "refused", what, MERGED)
    yield Finding("llama.cpp", "refused", what, MERGED)


def _experts(seen: Served) -> Iterator[Finding]:
    names = seen.config.target_parameters
    if names:
        what = f"it changes the experts' own parameters (target_parameters: {', '.join(sorted(names))})"
        only = "recent versions of vLLM take that, for some architectures"
        yield Finding("vLLM", "maybe", f"{what}; {only}", f"Where it is refused: {MERGED}")
        yield Finding("llama.cpp", "refused", what, MERGED)


def _transposed(seen: Served) -> Iterator[Finding]:
    if seen.config.fan_in_fan_out:
        what = "the base keeps its weights transposed (fan_in_fan_out), as GPT-2 does"
        yield Finding("vLLM", "refused", f"{what}, and vLLM has no LoRA for it", MERGED)
        yield Finding("llama.cpp", "refused", f"{what}, which its converter does not heed", MERGED)


def _ends(seen: Served) -> Iterator[Finding]:
    """LoRA on embeddings and on the head."""
    embeddings = any(tensor.name.endswith(".lora_embedding_A") for tensor in seen.tensors)
    head = any(module.rpartition(".")[2] == "lm_head" for module in seen.ranks)
    for what in ["the embeddings"] * embeddings + ["the head"] * head:
        told = f"it has LoRA on {what}"
        only = "vLLM takes that for architectures whose class lists it (Llama does; Qwen2 did not)"
        yield Finding("vLLM", "maybe", f"{told}; {only}", f"Where it is refused: {MERGED}")
        if seen.tied:
            one = "in this base embeddings and head are one tensor"
            yield Finding("llama.cpp", "refused", f"{told}, and {one}", MERGED)


def _size(seen: Served) -> Iterator[Finding]:
    size = sum(tensor.size for tensor in seen.tensors if tensor.dtype == "F32")
    if size >= LARGE:
        what = f"{size / 2**20:,.0f} MiB of it are float32, and vLLM computes in the base's dtype"
        remedy = "Stored as bfloat16 it takes half of that, each value rounded to 8 bits"
        yield Finding("all", "note", what, remedy)


def _base_name(seen: Served) -> Iterator[Finding]:
    name = seen.values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        what = f"{CONFIG} names no base"
    elif name.startswith(("/", ".", "~", "\\")) or Path(name).is_dir():
        what = f"{CONFIG} names the base by a path of this machine, {name!r:.200}"
    else:
        return
    yield Finding("all", "note", what, "Elsewhere, give the base by hand, as the commands do")


def _quantized(seen: Served) -> Iterator[Finding]:
    kind = seen.base.quantization
    if kind == "none":
        return
    what = f"it was trained on the base in {kind}; on 16-bit weights it is another function"
    if seen.quantized_alike:
        remedy = "vllm serve --quantization bitsandbytes quantizes the base likewise, on one card"
        yield Finding("vLLM", "note", what, remedy, option=True)
    else:
        which = "vLLM quantizes to nf4 with double quantization only"
        yield Finding("vLLM", "note", f"{what}, and {which}", f"{MERGED}, in the weights it was trained on")
    remedy = "lora-dpo export RUN --to gguf keeps the weights that it was trained on"
    yield Finding("llama.cpp", "note", f"{what}, and a GGUF of the base is made from those", remedy)


def _stored_quantized(seen: Served) -> Iterator[Finding]:
    if seen.stored_as is not None:
        what = f"the base's files are quantized by {seen.stored_as}, which its converter does not read"
        yield Finding("llama.cpp", "refused", what, "Give a 16-bit copy of the base, or export --to gguf")


def _chat_template(seen: Served) -> Iterator[Finding]:
    if not seen.other_template:
        return
    what = "it was trained with a chat template of its own, and the base's is taken unless one is given"
    file = seen.folder / TEMPLATE
    if file.is_file():
        yield Finding("vLLM", "wrong", what, f"Give vllm serve --chat-template {file}", option=True)
        remedy = f"Give llama-server --jinja --chat-template-file {file}"
        yield Finding("llama.cpp", "wrong", what, remedy, option=True)
    else:
        remedy = f"Write its text, chat_template in tokenizer_config.json, to {TEMPLATE} beside it"
        yield Finding("all", "wrong", what, remedy)


CHECKS: tuple[Callable[[Served], Iterator[Finding]], ...] = (
    _rank,
    _scaling,
    _saved_modules,
    _tokens,
    _dora,
    _experts,
    _transposed,
    _ends,
    _size,
    _base_name,
    _quantized,
    _stored_quantized,
    _chat_template,
)
