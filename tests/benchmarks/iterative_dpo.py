"""Does iterating help? Rounds beside one offline pass on the same labels, on the quickstart's base, by seed.

    python tests/benchmarks/iterative_dpo.py [--seeds 0 1 2] [--rounds 3] [--folder FOLDER] [key=value ...]

A hidden rule (right, and short) labels 300 pairs of the base's own responses. Offline: one DPO pass on those
labels, and another with as many passes as there are rounds. Rounds: a reward model is trained on the same
labels, and the rule is never asked again but to keep count. The rate is that of the rule over responses drawn
at temperature 1 to the same held-out prompts with the same noise, for all of them.

Columns: what was measured, each seed's figure, and their mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lora_dpo.judging import FunctionJudge, judge_file, read_samples
from lora_dpo.model import bare, load_adapter, load_model
from lora_dpo.quickstart.base import BaseSettings, cache_folder, quickstart_base, quickstart_data
from lora_dpo.quickstart.iterating import rule_labels, rule_reward, train_reward_model
from lora_dpo.recipe import Adapter, Data, IterativeRecipe, Judge, Recipe, override
from lora_dpo.rounds import LoopDirectory, run_rounds
from lora_dpo.rounds.prompts import read_prompts
from lora_dpo.rounds.stages import seeded
from lora_dpo.run_directory import RunDirectory
from lora_dpo.sampling import sample_to_file, sampler_id
from lora_dpo.training import Display, chat_tokenizer, train


def the_recipe() -> IterativeRecipe:
    """That of recipes/iterative_dpo.py."""
    file = Path(__file__).resolve().parents[2] / "recipes" / "iterative_dpo.py"
    spec = importlib.util.spec_from_file_location("iterative_dpo_recipe", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.recipe


def offline(recipe: IterativeRecipe, labels: Path, epochs: float, folder: Path) -> RunDirectory:
    """One run on the labels, all else as in a round."""
    given: dict[str, Any] = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(Recipe)}
    given["data"] = Data(str(labels), max_tokens=recipe.data.max_tokens)
    given["training"] = dataclasses.replace(recipe.training, epochs=epochs)
    given["run_directory"] = str(folder)
    run = RunDirectory(folder)
    if not run.has_adapter:
        train(Recipe(**given), quiet=True, resume=run.recipe_file.exists())
    return run


def rate(recipe: IterativeRecipe, loop: LoopDirectory, run: RunDirectory, name: str) -> float:
    """The rule's rate of a run, measured as the loop measures its rounds."""
    base = load_model(recipe.base)
    model = load_adapter(base, str(run.adapter_folder))
    chat = chat_tokenizer(base.tokenizer, recipe.data)
    settings = seeded(recipe.sampling, "held out", responses=recipe.rounds.held_out_responses)
    samples, judged = (loop.path / f"{name}-{kind}.jsonl" for kind in ("samples", "judged"))
    display, prompts = Display(quiet=True), read_prompts(recipe, loop.held_out_file)
    sampler = sampler_id(model, settings, chat.end_of_turn_ids)
    sample_to_file(model, chat, prompts, settings, samples, sampler=sampler, display=display)
    judge_file(FunctionJudge(rule_reward), samples, judged, display)
    bare(base)
    return mean(score for row in read_samples(judged) for score in row.scores)


def one_seed(recipe: IterativeRecipe, seed: int, folder: Path) -> dict[str, Any]:
    here = folder / f"seed-{seed}"
    recipe = dataclasses.replace(
        recipe,
        training=dataclasses.replace(recipe.training, seed=seed),
        sampling=dataclasses.replace(recipe.sampling, seed=seed),
        judge=Judge(f"reward:{here / 'reward'}"),
        run_directory=str(here / "loop"),
    )
    labels = rule_labels(recipe, here / "labels", Display(quiet=True))
    train_reward_model(recipe, labels, here / "reward", Display(quiet=True))
    resume = LoopDirectory(here / "loop").recipe_file.exists()
    loop = run_rounds(recipe, resume=resume, quiet=True)
    told = [json.loads(line) for line in loop.rounds_file.read_text().splitlines()]
    once = rate(recipe, loop, offline(recipe, labels, 1, here / "offline"), "offline")
    often = float(recipe.rounds.count)
    more = rate(recipe, loop, offline(recipe, labels, often, here / "offline-long"), "offline-long")
    records = RunDirectory(here / "reward").records()
    accuracy = [line["eval/rewards/accuracy"] for line in records if "eval/rewards/accuracy" in line][-1]
    return {"seed": seed, "offline": once, "offline_long": more, "rounds": told, "reward_accuracy": accuracy}


def row(name: str, values: list[str]) -> str:
    return f"{name:<34}" + "".join(f"{value:>12}" for value in values)


def table(found: list[dict[str, Any]], rounds: int) -> str:
    seeds = [f"seed {one['seed']}" for one in found]
    lines = [row("rule rate of sampled responses", [*seeds, "mean"])]

    def add(name: str, values: list[float], form: str = "{:.3f}") -> None:
        lines.append(row(name, [form.format(value) for value in [*values, mean(values)]]))

    def of(number: int, *keys: str) -> list[float]:
        values: list[Any] = [one["rounds"][number] for one in found]
        for key in keys:
            values = [value[key] for value in values]
        return values

    add("base (round 0)", of(0, "held_out_judge", "mean"))
    add("offline, one pass", [one["offline"] for one in found])
    add(f"offline, {rounds} passes", [one["offline_long"] for one in found])
    for number in range(1, rounds + 1):
        add(f"round {number}", of(number, "held_out_judge", "mean"))
    above = [one["rounds"][rounds]["held_out_judge"]["mean"] - one["offline"] for one in found]
    add("last round above offline", above)
    lines.append("")
    add("reward model, held-out accuracy", [one["reward_accuracy"] for one in found])
    for number in range(rounds + 1):
        add(f"reward, round {number}", of(number, "reward", "mean"))
    for number in range(1, rounds + 1):
        add(f"KL(policy ‖ base), round {number}", of(number, "kl", "mean"), "{:.2f}")
    for number in range(rounds + 1):
        add(f"tokens a response, round {number}", of(number, "guard", "tokens"), "{:.1f}")
    for number in range(1, rounds + 1):
        for stage in ("sample", "judge", "train", "measure"):
            add(f"seconds, round {number}, {stage}", of(number, "seconds", stage), "{:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/iterative-benchmark"))
    parser.add_argument("keys", nargs="*", help="keys of the recipe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = BaseSettings()
    quickstart_data(cache_folder(settings), settings)
    quickstart_base(cache_folder(settings), settings, Display())
    recipe = override(the_recipe(), ["rounds.patience=0", *args.keys])
    assert isinstance(recipe, IterativeRecipe) and isinstance(recipe.adapter, Adapter)
    found = []
    for seed in args.seeds:
        began = time.monotonic()
        found.append(one_seed(recipe, seed, args.folder.absolute()))
        print(f"seed {seed}: {time.monotonic() - began:.0f}s", file=sys.stderr, flush=True)
    print(table(found, recipe.rounds.count))


if __name__ == "__main__":
    main()
