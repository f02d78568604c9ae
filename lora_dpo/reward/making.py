"""Training a reward model: the ordinary training, with an objective of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_dpo.losses import BradleyTerry
from lora_dpo.recipe import Recipe
from lora_dpo.run_directory import RunDirectory
from lora_dpo.training import Observer, train


def as_reward_recipe(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Recipe:
    """The recipe, with BradleyTerry in place of an objective that trains no reward model; `say` is told."""
    if recipe.loss.needs.rewards:
        return recipe
    say(f"loss: BradleyTerry, in place of the recipe's {type(recipe.loss).__name__}")
    return replace(recipe, loss=BradleyTerry())


def train_reward(
    recipe: Recipe,
    *,
    observers: Sequence[Observer] = (),
    resume: bool = False,
    accept: Sequence[str] = (),
    quiet: bool = False,
) -> RunDirectory:
    """`train` of `as_reward_recipe`: the run's adapter/ holds a reward model's adapter with its score head.

    transformers and PEFT load it as AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    and PeftModel.from_pretrained(that, adapter/). Raises what `train` raises.
    """
    recipe = as_reward_recipe(recipe, (lambda line: None) if quiet else print)
    return train(recipe, observers=observers, resume=resume, accept=accept, quiet=quiet)
