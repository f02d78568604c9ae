"""The whole way in a few minutes, offline: base, DPO, evaluation, answers before and after, both exports."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_dpo.evaluation import Evaluation
from lora_dpo.export import Options, export, find_source
from lora_dpo.finished import Sample, evaluate_run, open_finished, side_by_side
from lora_dpo.quickstart.base import BaseSettings, cache_folder, quickstart_base, quickstart_data
from lora_dpo.quickstart.data import satisfies
from lora_dpo.recipe import Recipe
from lora_dpo.run_directory import RunDirectory, write_text
from lora_dpo.training import Display, train
from lora_dpo.training.progress import duration

PROMPTS = 100


@dataclass(frozen=True)
class TourResult:
    """accuracy: of held-out pairs. base_rule, policy_rule: share of greedy answers that satisfy the rule."""

    accuracy: float
    margin: float
    base_rule: float
    policy_rule: float
    seconds: float


def tour(
    recipe: Recipe,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    display: Display | None = None,
    settings: BaseSettings | None = None,
) -> TourResult:
    """Run the quickstart's recipe from nothing to two exports, and say what happened. Returns the figures.

    The recipe's base and data are those of `cache_folder(settings)`.
    """
    display = display or Display()
    # The model is so small that threads would mostly wait for each other, above all on a busy machine.
    torch.set_num_threads(1)
    started = time.monotonic()
    settings = settings or BaseSettings()
    folder = cache_folder(settings)
    display.say("1. a base and preferences of its own (kept for the next time)")
    quickstart_data(folder, settings)
    base = quickstart_base(folder, settings, display)
    display.say(f"   {base}\n\n2. DPO on a 4-bit copy of it")
    if not resume:
        recipe = replace(recipe, run_directory=str(free_folder(Path(recipe.run_directory))))
    directory = train(recipe, resume=resume, accept=accept)
    display.say("\n3. held-out evaluation")
    finished = open_finished(directory.path)
    evaluation = evaluate_run(finished, display=display)
    samples = side_by_side(finished, count=PROMPTS, max_new_tokens=80, display=display)
    result = figures(evaluation, samples, time.monotonic() - started)
    _report(display, evaluation, samples, result)
    display.say("\n4. exports")
    _export(display, directory)
    result = replace(result, seconds=time.monotonic() - started)
    write_text(directory.path / "quickstart.json", json.dumps(vars(result), indent=1))
    _where(display, directory, result)
    return result


def free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, … that holds no run yet."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000))]
    return next(path for path in names if not RunDirectory(path).recipe_file.exists())


def figures(evaluation: Evaluation, samples: Sequence[Sample], seconds: float) -> TourResult:
    means = evaluation.means()
    rules = [
        sum(satisfies(sample.prompt, text) for sample, text in zip(samples, texts, strict=True))
        / len(samples)
        for texts in ([s.base for s in samples], [s.policy for s in samples])
    ]
    return TourResult(means["rewards/accuracy"], means["rewards/margin"], rules[0], rules[1], seconds)


def _report(display: Display, evaluation: Evaluation, samples: Sequence[Sample], result: TourResult) -> None:
    metrics = evaluation.metrics
    display.say(f"   preference accuracy {metrics['rewards/accuracy']}  (0.5 before training)")
    display.say(f"   implicit reward margin {metrics['rewards/margin']}")
    display.say(
        f"   short and right, by rule, of {len(samples)} greedy answers:"
        f" base {result.base_rule:.2f}, policy {result.policy_rule:.2f}"
    )
    for sample in samples[:3]:
        display.say(f"\n   prompt  {sample.prompt}\n   base    {sample.base}\n   policy  {sample.policy}")


def _export(display: Display, directory: RunDirectory) -> None:
    source = find_source(directory.path)
    export(source, "adapter", display=display)
    # This model is so small, and trained at so high a rate, that 16 bits would do; float32 is to the digit.
    export(source, "merged", options=Options(dtype="float32"), display=display)


def _where(display: Display, directory: RunDirectory, result: TourResult) -> None:
    display.say(f"\ndone in {duration(result.seconds)}. Everything lies in {directory.path}")
    for name in ("recipe.yaml", "metrics.jsonl", "samples.jsonl", "adapter/", "export-merged/"):
        display.say(f"   {name}")
    display.say("next: your own data, see README.md, “Your own data”")
