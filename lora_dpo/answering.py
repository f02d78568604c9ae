"""Responses of a run's policy, or of a recipe's base, to the prompts of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.finished import check_adapter
from lora_dpo.model import (
    Model,
    check_early,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_record,
    record_notes,
)
from lora_dpo.preferences import Prompt, describe_skipped, load_prompts
from lora_dpo.recipe import Data, Recipe, Sampling, load_recipe, sampling_of
from lora_dpo.run_directory import RunDirectory
from lora_dpo.sampling import VLLM, Counts, Role, sample_to_file, sampler_id, vllm_never
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import Display, chat_tokenizer


@dataclass(frozen=True)
class Speaker:
    """Who answers. role: the run's policy, or the base."""

    model: Model | VLLM
    chat: ChatTokenizer
    role: Role


def answer_prompts(
    source: Path,
    prompts: str,
    output: Path,
    *,
    words: Sequence[str] = (),
    limit: int | None = None,
    base_only: bool = False,
    vllm: bool = False,
    display: Display,
) -> Counts:
    """`sample_to_file` for a run directory or a recipe file.

    prompts: rows with a prompt, as data.train names rows. words: "key=value", of the sampling or (with a dot)
    of the recipe. vllm: it draws, in place of the model in memory. Raises UserError before the base is loaded
    where keys or rows are wrong.
    """
    recipe, adapter = _recipe_of(source, [w for w in words if not _of_sampling(w)], base_only)
    settings = sampling_of([w for w in words if _of_sampling(w)])
    records = _prompts(recipe.data, prompts, limit, recipe.training.seed, display)
    longest = recipe.data.max_prompt_tokens or recipe.data.max_tokens
    speaker = _speaker(recipe, adapter, settings if vllm else None, longest, display)
    stop_ids = speaker.chat.end_of_turn_ids
    if not stop_ids:
        display.say("the tokenizer has no end-of-turn: every response runs to sampling.max_new_tokens")
    return sample_to_file(
        speaker.model,
        speaker.chat,
        records,
        settings,
        output,
        sampler=_sampler_id(speaker, settings),
        role=speaker.role,
        display=display,
        longest=longest,
    )


def _of_sampling(word: str) -> bool:
    key = word.partition("=")[0]
    return "." not in key or key.startswith("sampling.")


def _recipe_of(source: Path, words: Sequence[str], base_only: bool) -> tuple[Recipe, Path | None]:
    """The recipe, and the folder of the adapter that answers. Raises RunError for a folder that is no run."""
    if source.is_file():
        return load_recipe(source, words), None
    run = RunDirectory.open(source)
    if not base_only:
        check_adapter(run)
    return load_recipe(run.recipe_file, words), None if base_only else run.adapter_folder


def _prompts(data: Data, source: str, limit: int | None, seed: int, display: Display) -> list[Prompt]:
    alone = dataclasses.replace(data, train=source, eval=(), eval_fraction=0.0, eval_last=0, max_rows=limit)
    loaded = load_prompts(alone, seed=seed)
    for line in describe_skipped(loaded):
        display.say(line)
    return loaded.train


def _speaker(
    recipe: Recipe, adapter: Path | None, by_vllm: Sampling | None, longest: int | None, display: Display
) -> Speaker:
    """by_vllm: what vLLM has to make room for; None loads the model into this process."""
    tokenizer = load_tokenizer(recipe.base)
    chat = chat_tokenizer(tokenizer, recipe.data)
    role: Role = "base" if adapter is None else "policy"
    if adapter is not None:
        check_early(recipe.base, str(adapter), "the adapter")
    if by_vllm is not None:
        head = load_config(recipe.base).get_text_config()
        never = vllm_never(tokenizer, head.vocab_size, chat.end_of_turn_ids)
        room = None if longest is None else longest + by_vllm.max_new_tokens
        context = getattr(head, "max_position_embeddings", None)
        tokens = min((size for size in (context, room) if size is not None), default=VLLM.tokens)
        model = VLLM(recipe.base, None if adapter is None else str(adapter), tokens=tokens, never=never)
    elif adapter is None:
        return Speaker(load_model(recipe.base), chat, role)
    else:
        model = load_adapter(load_model(recipe.base), str(adapter))
    if adapter is not None:
        record = read_record(adapter)
        for line in record_notes(record, recipe.base, chat.chat_template, f"the adapter in {adapter}"):
            display.say(line)
    return Speaker(model, chat, role)


def _sampler_id(speaker: Speaker, settings: Sampling) -> str:
    model, stop_ids = speaker.model, speaker.chat.end_of_turn_ids
    if isinstance(model, VLLM):
        return model.sampler_id(settings, stop_ids, role=speaker.role)
    return sampler_id(model, settings, stop_ids, role=speaker.role)
