"""Rounds on the quickstart's base: labels by a hidden rule, a reward model trained on them, then the loop.

The rule (`satisfies`) labels 300 pairs of the base's own responses, and from then on only keeps count: it is
the loop's held-out judge, so that the table shows how often responses are really right beside what the
reward model thinks of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import xxhash

from lora_dpo.errors import RunError
from lora_dpo.judging import FunctionJudge, judge_file, pair_file
from lora_dpo.losses import BradleyTerry
from lora_dpo.model import check_base, content_hash, load_model, read_record
from lora_dpo.preferences import load_prompts
from lora_dpo.quickstart.base import BaseSettings, cache_folder, quickstart_base, quickstart_data
from lora_dpo.quickstart.data import satisfies
from lora_dpo.recipe import Adapter, Data, IterativeRecipe, Recipe, Sampling, Training, pinned, to_dict
from lora_dpo.rounds import LoopDirectory, run_rounds
from lora_dpo.run_directory import RunDirectory, write_text
from lora_dpo.sampling import sample_to_file, sampler_id
from lora_dpo.training import Display, chat_tokenizer, train
from lora_dpo.training.resuming import recipe_differences

LABELS = 300


def rule_reward(prompt: Any, response: str) -> float:
    """1 where a response satisfies the rule behind the quickstart's preferences, else 0. prompt: messages."""
    return float(satisfies(prompt[-1]["content"], response))


def iterate(
    recipe: IterativeRecipe,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    display: Display | None = None,
    settings: BaseSettings | None = None,
) -> LoopDirectory:
    """Base, labels, reward model and rounds. Returns the loop's folder; the reward model is beside it.

    The recipe's base and data are those of `cache_folder(settings)`, its judge the reward model that is
    trained here, in the folder that it names.
    """
    display = display or Display()
    torch.set_num_threads(1)  # so small a model's threads would mostly wait for each other
    settings = settings or BaseSettings()
    folder = cache_folder(settings)
    display.say("1. a base of its own (kept for the next time)")
    quickstart_data(folder, settings)
    quickstart_base(folder, settings, display)
    display.say("\n2. labels by a rule that nobody else sees, and a reward model trained on them")
    labels = rule_labels(recipe, folder / f"labels-{recipe.training.seed}", display)
    reward = Path(recipe.judge.what).expanduser()
    train_reward_model(recipe, labels, reward, display)
    display.say("\n3. rounds: sample, judge, pair, train, measure")
    if not resume and LoopDirectory(Path(recipe.run_directory)).recipe_file.exists():
        recipe = replace(recipe, run_directory=str(free_loop(Path(recipe.run_directory))))
    return run_rounds(recipe, resume=resume, accept=accept)


def free_loop(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, … that holds no rounds yet."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000))]
    return next(path for path in names if not LoopDirectory(path).recipe_file.exists())


def rule_labels(recipe: IterativeRecipe, folder: Path, display: Display, count: int = LABELS) -> Path:
    """A preference file of so many pairs of the base's own responses to training prompts, as the rule labels
    them, or of all there are. It is made once, in a folder of its own for everything that it depends on.
    """
    seed = recipe.training.seed
    prompts = load_prompts(recipe.data, seed=seed).train
    judge = FunctionJudge(rule_reward)
    folder = folder / _fingerprint(recipe, prompts, judge, count)
    file = folder / "labels.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        base = load_model(recipe.base)
        chat = chat_tokenizer(base.tokenizer, recipe.data)
        sampling = Sampling(responses=8, max_new_tokens=recipe.sampling.max_new_tokens, seed=seed)
        sampler = sampler_id(base, sampling, chat.end_of_turn_ids, role="base")
        samples, judged, pairs = (folder / f"{name}.jsonl" for name in ("samples", "judged", "pairs"))
        sample_to_file(base, chat, prompts, sampling, samples, sampler=sampler, role="base", display=display)
        judge_file(judge, samples, judged, display)
        pairing = replace(recipe.pairing, strategy="best_random", seed=seed)
        for line in pair_file(judged, pairs, pairing).lines():
            display.say(f"   labels: {line}")
        rows = sorted(pairs.read_bytes().splitlines(keepends=True))
        Random(seed).shuffle(rows)
        write_text(file, b"".join(rows[:count]).decode())
    made = file.read_bytes().count(b"\n")
    if made < count:
        display.say(f"   note: there are {made} labelled pairs, not {count}: no more prompts gave one")
    return file


def _fingerprint(recipe: IterativeRecipe, prompts: Sequence[Any], judge: FunctionJudge, count: int) -> str:
    """16 hexadecimal digits of what labels are made of: base, prompts, rule, and the settings that matter."""
    told = to_dict(recipe)
    facts = [
        content_hash(recipe.base),
        *(told[name] for name in ("base", "data", "pairing")),
        [[record.prompt, record.tools, dict(record.template_kwargs)] for record in prompts],
        judge.fingerprint,
        recipe.sampling.max_new_tokens,
        recipe.training.seed,
        count,
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


def reward_recipe(recipe: IterativeRecipe, labels: Path, folder: Path) -> Recipe:
    """How the reward model is trained: on the labels but for a tenth, on the loop's base."""
    return Recipe(
        base=recipe.base,
        data=Data(str(labels), eval_fraction=0.1, max_tokens=recipe.data.max_tokens),
        loss=BradleyTerry(),
        adapter=Adapter(rank=16, alpha=32),
        training=Training(
            pairs_per_step=16,
            epochs=4,
            learning_rate=3e-4,
            gradient_checkpointing="none",
            seed=recipe.training.seed,
        ),
        run_directory=str(folder),
    )


def train_reward_model(recipe: IterativeRecipe, labels: Path, folder: Path, display: Display) -> None:
    """Train it, go on with it, or leave it as it is. Raises RunError or ModelError where the one that is
    there is another: of other labels or settings, or on another base.
    """
    run, wanted = RunDirectory(folder), reward_recipe(recipe, labels, folder)
    if run.has_adapter:
        differ = recipe_differences(pinned(wanted), run.recipe_file)
        if differ:
            raise RunError(
                f"the reward model in {folder} is not this recipe's: {'; '.join(map(str, differ))}. Name"
                " another folder with judge.of=reward:FOLDER, or delete that one"
            )
        check_base(read_record(run.adapter_folder), recipe.base, f"the reward model in {folder}")
        display.say(f"   the reward model in {folder} is there already")
        return
    train(wanted, resume=run.recipe_file.exists(), quiet=display.quiet)
