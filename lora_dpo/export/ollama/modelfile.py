"""A Modelfile for Ollama: what to serve, the chat template in its language, where to stop, how to sample.

Ollama doesn't run Jinja. Its TEMPLATE is derived from the tokenizer's and compared with it on conversations;
where that can't be done it is left out, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_dpo.errors import RunError
from lora_dpo.export.ollama.chat_turns import Message, NotExpressible, find_turns
from lora_dpo.export.ollama.go_template import go_template
from lora_dpo.model import load_tokenizer
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base
from lora_dpo.run_directory import write_text
from lora_dpo.tokenization import ChatTokenizer

MODELFILE = "Modelfile"

OLLAMAS_CONTEXT = 4096
"""Tokens of context that Ollama gives a model that says nothing."""

SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of generation_config.json → Ollama's parameters. Nothing else is set, and nothing that isn't there."""

IMPORTED = frozenset(
    {
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Olmo3ForCausalLM",
        "CohereForCausalLM",
        "GptOssForCausalLM",
        "DeepseekV3ForCausalLM",
        "Lfm2ForCausalLM",
    }
)
"""Architectures whose safetensors Ollama converts itself (its convert/convert.go); others come as GGUF."""


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile. notes: what to know of it, in words. templated: it has a TEMPLATE."""

    text: str
    notes: tuple[str, ...]
    templated: bool

    def describe(self) -> list[str]:
        """Lines for a person."""
        return [f"Ollama: ollama create NAME -f {MODELFILE}", *self.notes]


def write_modelfile(
    folder: Path,
    model: Path,
    *,
    source: str | Path | None = None,
    adapter: Path | None = None,
    context: int | None = None,
) -> Modelfile:
    """Write FOLDER/Modelfile, by one rename.

    model: a folder with tokenizer and chat template, and config.json and generation_config.json where they
    are: a merged model, or an adapter's. source: what FROM names: a merged folder, a GGUF file, or a model
    that Ollama has; by default `model`. adapter: a GGUF adapter. context: tokens (num_ctx); by default
    nothing, so that Ollama's own limit holds, unless the model's is lower. Raises RunError.
    """
    tokenizer = load_tokenizer(Base(str(model), quantization="none"))
    config, generation = (_read(model / name) for name in ("config.json", "generation_config.json"))
    lines = ["FROM " + _place(model if source is None else source, folder)]
    notes: list[str] = []
    if adapter is not None:
        lines.append("ADAPTER " + _place(adapter, folder))
    elif source is None or (isinstance(source, Path) and source.is_dir()):
        notes += _import_notes(config)
    template, found = template_of(tokenizer)
    notes += found
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    ends = stop_words(tokenizer)
    lines += [f"PARAMETER stop {_quoted(word)}" for word in ends]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling(generation).items()]
    limit, more = _context(config, context)
    notes += more + ([] if ends else ["no token is known to end a turn: no stop word is set"])
    lines += [f"PARAMETER num_ctx {limit}"] if limit else []
    made = Modelfile("\n".join(lines) + "\n", tuple(notes), template is not None)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MODELFILE, made.text)
    return made


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, "base.model") if file.is_file() else {}


def _place(what: str | Path, folder: Path) -> str:
    """What FROM and ADAPTER name: Ollama reads paths from the Modelfile's folder on. Raises RunError."""
    if isinstance(what, str):
        text = what
    elif what.absolute() == folder.absolute():
        text = "./"
    elif folder.absolute() in what.absolute().parents:
        text = "./" + what.absolute().relative_to(folder.absolute()).as_posix()
    else:
        text = str(what.absolute())
    if not text.isprintable() or text != text.strip() or '"' in text:
        raise RunError(f"a Modelfile can't name {text!r}: Ollama would read another path; rename it")
    return text


def _import_notes(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures") or ["an unknown architecture"]
    if names[0] in IMPORTED:
        return []
    return [f"Ollama may not import {names[0]} from safetensors: give it a GGUF instead (--to gguf)"]


def template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, list[str]]:
    """(the TEMPLATE, None where there can be none; notes in words)."""
    source = ChatTokenizer(tokenizer).chat_template
    if source is None:
        return None, ["the tokenizer has no chat template, and the Modelfile no TEMPLATE: prompts go in bare"]

    def render(messages: Sequence[Message], generation: bool) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=source,
            add_generation_prompt=generation,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    try:
        turns = find_turns(render, str(tokenizer.bos_token or ""), adds_bos(tokenizer))
    except NotExpressible as reason:
        return None, [
            f"no TEMPLATE: Ollama's language can't say what the chat template does ({reason}). Ollama then"
            " takes the one of its own that looks most like it, or passes prompts bare: render prompts"
            " yourself (raw), or serve the GGUF with llama-server --jinja"
        ]
    notes = ["TEMPLATE: the same text as the tokenizer's own on every conversation that was compared"]
    if turns.system is None:
        notes.append("the chat template takes no system message, and TEMPLATE leaves them out")
    if turns.trims:
        notes.append("the chat template strips white space around contents; Ollama has nothing that does")
    if "strftime_now" in source:
        notes.append("the chat template writes today's date, which stays in TEMPLATE as it is today")
    if "tools" in source:
        notes.append("tools are not in TEMPLATE: Ollama won't offer any to this model")
    return go_template(turns), notes


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS in front of a text by itself, as Ollama will too."""
    ids, bos = tokenizer("a").input_ids, tokenizer.bos_token_id
    return isinstance(bos, int) and bool(ids) and ids[0] == bos


def stop_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What ends an assistant's turn: the template's end-of-turn, then the EOS."""
    ids = ChatTokenizer(tokenizer).end_of_turn_ids
    words = [str(tokenizer.convert_ids_to_tokens(n)) for n in ids]
    return [word for word in words if all(letter.isprintable() for letter in word)]


def _quoted(word: str) -> str:
    return f'"""{word}"""' if '"' in word else f'"{word}"'


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Ollama's parameters for what generation_config.json says; greedy where it says so."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    values = {name: generation.get(key) for key, name in SAMPLING.items()}
    return {name: float(value) for name, value in values.items() if type(value) in (int, float)}  # pyright: ignore


def _context(config: Mapping[str, Any], context: int | None) -> tuple[int | None, list[str]]:
    if context is not None:
        return context, []
    own = config.get("max_position_embeddings")
    if not isinstance(own, int):
        return None, []
    if own < OLLAMAS_CONTEXT:
        return own, []
    return None, [f"the model reads up to {own:,} tokens; how many Ollama gives it is num_ctx, not set here"]
