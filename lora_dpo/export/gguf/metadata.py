"""The keys of a GGUF file against config, tokenizer and chat template of what it was made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lora_dpo.export.gguf.file import GgufFile
from lora_dpo.model import load_config, load_tokenizer
from lora_dpo.recipe import Base
from lora_dpo.tokenization import ChatTokenizer

if TYPE_CHECKING:
    from lora_dpo.export.gguf.check import Check

ENDS_BY_NAME = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|end_of_text|>",
        "<EOT>",
        "<｜end▁of▁sentence｜>",
    }
)
"""Tokens at which llama.cpp ends a turn whatever the file's keys say (its src/llama-vocab.cpp)."""

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
    "rope.dimension_count": "head_dim",
}
"""Keys of the architecture in the file → keys of config.json, compared where both say something."""

_NEEDED = ("context_length", "embedding_length", "block_count")


def check_metadata(check: Check, file: GgufFile, merged: Path) -> None:
    """Add to the findings what differs from a merged model's folder."""
    base = Base(str(merged), quantization="none")
    config = load_config(base).get_text_config()
    for key, name in _SIZES.items():
        _equal(check, file, key, name, getattr(config, name, None))
    _check_rope(check, file, config)
    kind = file.get("general.type")
    if kind not in (None, "model"):
        check.findings.append(f"general.type is {kind!r}, not 'model'")
    check_tokenizer(check, file, load_tokenizer(base), config.vocab_size)


def _equal(check: Check, file: GgufFile, key: str, name: str, wanted: Any) -> None:
    found = file.own(key)
    if found is None:
        if key in _NEEDED:
            check.findings.append(f"{file.architecture}.{key} is not there")
        return
    if not isinstance(found, (int, float)) or not isinstance(wanted, (int, float)):
        return
    if not math.isclose(found, wanted, rel_tol=1e-6):  # floats are float32 in the file
        check.findings.append(
            f"{file.architecture}.{key} is {found:g}, and config.json says {name} {wanted:g}"
        )


def _check_rope(check: Check, file: GgufFile, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return  # one a kind of layer, or none
    _equal(check, file, "rope.freq_base", "rope_theta", rope.get("rope_theta"))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found = file.own("rope.scaling.type")
        if found != kind:
            check.findings.append(f"RoPE is scaled by {kind!r} in config.json, and by {found!r} in the file")
        _equal(check, file, "rope.scaling.factor", "rope_parameters.factor", rope.get("factor"))
    elif kind == "llama3" and "rope_freqs.weight" not in file.tensors:
        check.findings.append(
            "RoPE is scaled as Llama 3's in config.json, and rope_freqs.weight is not there"
        )


def check_tokenizer(check: Check, file: GgufFile, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add to the findings what differs from a tokenizer. rows: of the embeddings."""
    tokens = file.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        check.findings.append("there is no vocabulary in the file")
        return
    if len(tokens) != rows:
        check.findings.append(f"the file has {len(tokens):,} tokens for {rows:,} rows of embeddings")
    wanted = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(tokens)))))
    differing = [n for n, token in enumerate(wanted) if not _same_token(token, tokens[n])]
    if differing:
        n = differing[0]
        check.findings.append(
            f"{len(differing):,} tokens differ from the tokenizer's: {n} is {tokens[n]!r} in the file and"
            f" {wanted[n]!r} there"
        )
    template = ChatTokenizer(tokenizer).chat_template
    if file.get("tokenizer.chat_template") != template:
        there = "another than" if file.get("tokenizer.chat_template") else "none, unlike"
        check.findings.append(f"the chat template in the file is {there} the tokenizer's")
    _check_ends(check, file, tokenizer, tokens)
    _check_bos(check, file, tokenizer)


def _same_token(wanted: str | None, found: str) -> bool:
    # Added tokens come with spaces for SentencePiece's bars.
    return wanted is None or found == wanted or found.replace("▁", " ") == wanted.replace("▁", " ")


def _check_ends(check: Check, file: GgufFile, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Generation has to end where the template ends an assistant's turn."""
    eos = file.get("tokenizer.ggml.eos_token_id")
    if isinstance(tokenizer.eos_token_id, int) and eos != tokenizer.eos_token_id:
        check.findings.append(f"the file's EOS is token {eos}, and the tokenizer's {tokenizer.eos_token_id}")
    keys = {eos, *(file.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))}
    ends = ChatTokenizer(tokenizer).end_of_turn_ids
    if not ends:
        check.notes.append("no token is known to end a turn: neither the template nor the tokenizer has one")
        return
    text = tokens[ends[0]] if ends[0] < len(tokens) else ""
    if ends[0] in keys:
        return
    if text in ENDS_BY_NAME:
        check.notes.append(
            f"turns end with {text}, which the file's keys don't say; llama.cpp knows it by name"
        )
    else:
        check.findings.append(
            f"turns end with {text!r} (token {ends[0]}), and neither eos_token_id nor eot_token_id says so:"
            " generation would run on"
        )


def _check_bos(check: Check, file: GgufFile, tokenizer: PreTrainedTokenizerBase) -> None:
    bos, told = tokenizer.bos_token_id, file.get("tokenizer.ggml.add_bos_token")
    found = file.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos, int) and found is not None and found != bos:
        check.findings.append(f"the file's BOS is token {found}, and the tokenizer's {bos}")
    ids = tokenizer("a").input_ids
    adds = isinstance(bos, int) and bool(ids) and ids[0] == bos
    if told is not None and bool(told) != adds:
        check.findings.append(
            f"the file {'adds' if told else 'adds no'} BOS to a prompt, and the tokenizer"
            f" {'does' if adds else 'does not'}"
        )


def check_adapter_metadata(check: Check, file: GgufFile, adapter: Path) -> None:
    """Add to the findings what differs from an adapter's config (with one alpha and the plain scale)."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if file.get(key) != wanted:
            check.findings.append(f"{key} is {file.get(key)!r}, not {wanted!r}")
    alpha = file.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isclose(alpha, config["lora_alpha"], rel_tol=1e-6):
        check.findings.append(f"adapter.lora.alpha is {alpha}, and the adapter's is {config['lora_alpha']}")
    pairs = {name.rpartition(".lora_")[0] for name in file.tensors if ".lora_" in name}
    for name in sorted(pairs):
        a, b = file.tensors.get(f"{name}.lora_a"), file.tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            check.findings.append(f"{name} has only one of its two factors")
        elif b.shape[-1] != (a.shape[-1] if name.startswith("token_embd") else a.shape[0]):
            check.findings.append(
                f"the factors of {name} have different ranks: {list(a.shape)}, {list(b.shape)}"
            )
