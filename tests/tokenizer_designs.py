"""Small tokenizers and chat templates in the designs that are in use, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Hello there, how are you today? I am fine, thank you.",
    "The user asks a question and the assistant answers it in two short lines.",
    "What is 12 plus 30? The answer is 42.\n\nIs that right?\n",
    "system user assistant tool model final analysis function name arguments city Paris weather",
    'Think about it: {"name": "get_weather", "arguments": {"city": "Paris"}} <b>bold</b> ok | no [1] x > y',
] * 4

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set answer = m.content %}
{%- if '</think>' in answer %}
{%- set thought = answer.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') }}
{%- else %}{{ answer }}{% endif %}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

LLAMA3 = """{%- for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}"""

GEMMA = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

ZEPHYR = """{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

HARMONY = """{%- for m in messages %}{% if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# The role is written between bars that are half of a control string; real ones do so too.
PHI = """{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

MISTRAL_TOOLS = """{{- bos_token }}{%- if tools %}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{% if m.tool_calls %}{{ '[TOOL_CALLS]' }}
{%- for call in m.tool_calls %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}
{%- endif %}{{ m.content + eos_token }}
{%- elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"""

# The bars of the real format are full-width; the code points keep this file readable.
DEEPSEEK = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<@Assistant@>' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ '<@User@>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<@Assistant@><think>\n' }}{% endif %}""".replace("@", "\uff5c")

SENTENCEPIECE_DECODER = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)
SPEECH = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Design:
    """One tokenizer with its template. end: end-of-turn of the last turn, middle: of earlier ones."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    template: str
    end: str
    middle: str
    trims: bool = False
    system: bool = True
    lead: str = ""

    def ids(self, text: str) -> list[int]:
        """The ordinary tokenization of a rendering."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[dict]) -> str:
        text = self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        assert isinstance(text, str)
        return text


def _finish(
    backend: Tokenizer, special: list[str], other: list[str], bos: str | None, eos: str, adds_bos: bool
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in other])
    if adds_bos and bos:
        pair = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def byte_level(
    special: list[str],
    other: list[str],
    bos: str | None,
    eos: str,
    adds_bos: bool = False,
    ignore_merges: bool = False,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return _finish(backend, special, other, bos, eos, adds_bos)


def sentencepiece(
    special: list[str], other: list[str], bos: str, eos: str, kind: str, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """kind: "metaspace", "legacy" (a normalizer that prepends) or "replace" (nothing prepended)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("\u2581")] if kind == "legacy" else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    spaced = [line.replace(" ", "\u2581") for line in " ".join(TEXT).split()]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *special], show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([f"\u2581{word}" for word in spaced], trainer)
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    state["model"].update(byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = SENTENCEPIECE_DECODER
    return _finish(backend, special, other, bos, eos, adds_bos)


def unigram(special: list[str], bos: str, eos: str) -> PreTrainedTokenizerFast:
    """Control strings are pieces of the vocabulary as well, with the best score of all."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(" "), "\u2581")
    trainer = trainers.UnigramTrainer(
        vocab_size=220,
        special_tokens=["<unk>", *special],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=[*map(chr, range(33, 127)), "\n", "\u00e9", "\u4f60", "\U0001f600"],
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.decoder = SENTENCEPIECE_DECODER
    return _finish(backend, special, [], bos, eos, adds_bos=True)


def _chatml_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], list(SPEECH), None, "<|im_end|>")


def _llama3() -> Design:
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    tokenizer = byte_level(special, [], special[0], special[1], adds_bos=True, ignore_merges=True)
    return Design("llama3", tokenizer, LLAMA3, "<|eot_id|>", "<|eot_id|>", trims=True)


def _mistral() -> Design:
    tokenizer = sentencepiece(["<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>", "metaspace")
    return Design("mistral", tokenizer, MISTRAL, "</s>", "</s>", lead=" ")


def _gemma() -> Design:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    plain = ["\n\n", "\u2581\u2581", "<b>", "</b>"]
    tokenizer = sentencepiece(special, plain, "<bos>", "<eos>", "replace")
    return Design("gemma", tokenizer, GEMMA, "<end_of_turn>", "<end_of_turn>", trims=True, system=False)


def _harmony() -> Design:
    special = [
        "<|startoftext|>",
        "<|start|>",
        "<|message|>",
        "<|end|>",
        "<|channel|>",
        "<|return|>",
        "<|call|>",
    ]
    tokenizer = byte_level(special, [], "<|startoftext|>", "<|return|>")
    lead = "<|channel|>final<|message|>"
    return Design("harmony", tokenizer, HARMONY, "<|return|>", "<|end|>", lead=lead)


def _deepseek() -> Design:
    begin, end, user, model = (
        text.replace("@", "\uff5c") for text in ("<@begin@>", "<@end@>", "<@User@>", "<@Assistant@>")
    )
    tokenizer = byte_level([begin, end], [user, model, *SPEECH], begin, end, adds_bos=True)
    return Design("deepseek", tokenizer, DEEPSEEK, end, end)


def _phi() -> Design:
    """Its control tokens take the white space that follows them along."""
    strings = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer = sentencepiece(["<s>", *strings], [], "<s>", "<|endoftext|>", "legacy", adds_bos=False)
    return with_flags(Design("phi", tokenizer, PHI, "<|end|>", "<|end|>"), rstrip=True)


def _mistral_tools() -> Design:
    pairs = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS", "SYSTEM_PROMPT")
    strings = ["<s>", "</s>", "[TOOL_CALLS]", *(f"[{end}{name}]" for name in pairs for end in ("", "/"))]
    tokenizer = byte_level(strings, [], "<s>", "</s>", adds_bos=True)
    return Design("mistral-tools", tokenizer, MISTRAL_TOOLS, "</s>", "</s>")


def _normalizing() -> Design:
    """Its control strings are matched after the normalizer has made ASCII of full-width characters."""
    design = Design("nfkc", _chatml_tokenizer(), CHATML, "<|im_end|>", "<|im_end|>")
    state = json.loads(design.tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFKC"}
    return with_flags(replace(design, tokenizer=_again(design.tokenizer, state)), normalized=True)


def _nested() -> Design:
    """Control strings that begin, end and hold others, and take white space along on the left."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>>", "<<|im_end|>", "<|im", "|>"]
    tokenizer = byte_level(special, list(SPEECH), None, "<|im_end|>")
    return with_flags(Design("nested", tokenizer, CHATML, "<|im_end|>", "<|im_end|>"), lstrip=True)


def with_flags(design: Design, **flags: bool) -> Design:
    """The design with these flags on its control tokens: special, normalized, lstrip, rstrip, single_word."""
    state = json.loads(design.tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] not in (*SPEECH, "\n\n", "\u2581\u2581", "<b>", "</b>"):
            token.update(flags)
    return replace(design, tokenizer=_again(design.tokenizer, state))


def _again(tokenizer: PreTrainedTokenizerFast, state: dict) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(json.dumps(state))
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    # Given to the constructor they would be made special, whatever the file says.
    made._special_tokens_map |= {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    made._special_tokens_map["unk_token"] = "<unk>" if core.token_to_id("<unk>") is not None else None
    return made


BUILDERS: dict[str, Callable[[], Design]] = {
    "chatml": lambda: Design("chatml", _chatml_tokenizer(), CHATML, "<|im_end|>", "<|im_end|>"),
    "qwen3": lambda: Design("qwen3", _chatml_tokenizer(), QWEN3, "<|im_end|>", "<|im_end|>"),
    "llama3": _llama3,
    "mistral": _mistral,
    "gemma": _gemma,
    "zephyr": lambda: Design(
        "zephyr", sentencepiece(["<s>", "</s>"], [], "<s>", "</s>", "legacy"), ZEPHYR, "</s>", "</s>"
    ),
    "unigram": lambda: Design("unigram", unigram(["<s>", "</s>"], "<s>", "</s>"), ZEPHYR, "</s>", "</s>"),
    "harmony": _harmony,
    "deepseek": _deepseek,
    "phi": _phi,
    "mistral-tools": _mistral_tools,
}

TRICKY: dict[str, Callable[[], Design]] = {"nfkc": _normalizing, "nested": _nested}
"""Designs in which the ordinary tokenization of a rendering is not what these tests compare with."""
