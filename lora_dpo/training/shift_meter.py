"""Shift in a run: on which prompts, when, at what cost; whatever goes wrong with it, the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lora_dpo.model import Model
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.recipe import Recipe
from lora_dpo.shift import data_sides, measure_shift, some_prompts
from lora_dpo.tokenization import Branches
from lora_dpo.training.data import TrainingData
from lora_dpo.training.fading import Fading

DEAR_SHARE, DEAR_SECONDS = 0.1, 30.0
"""What takes more of the time than this share is said to, once it has taken so many seconds."""


class ShiftMeter:
    """Measures shift on a run's prompts: `examples`, none where nothing is measured. `fading` looks at what
    comes of it.
    """

    def __init__(self, recipe: Recipe, model: Model, data: TrainingData, say: Callable[[str], None]):
        self.settings, self.objective, self._say = recipe.shift, recipe.loss, say
        self._model, self._seed = model, recipe.training.seed
        self._stop_ids = data.tokenizer.end_of_turn_ids
        self._began, self._spent = time.monotonic(), 0.0
        self._dear = self._failed = False
        self.fading = Fading(self.settings)
        self.examples: list[Branches] = []
        if self.settings.prompts and not getattr(self.objective.needs, "rewards", False):
            self._choose(data.eval or data.train)
            if not data.eval:
                say("note: no rows are held out: shift/… is measured on prompts that are trained on")

    def _choose(self, branches: Sequence[Branches]) -> None:
        positions = getattr(self._model.causal.config.get_text_config(), "max_position_embeddings", None)
        longest = positions - self.settings.max_new_tokens if positions else None
        self.examples = some_prompts(branches, self.settings.prompts, seed=self._seed, longest=longest)
        if not self.examples:
            self._say(
                f"note: no prompt leaves room for shift.max_new_tokens ({self.settings.max_new_tokens}) among"
                f" the model's {positions} positions: shift/… is not measured"
            )

    def due(self, step: int, last: int, evaluation: bool) -> bool:
        """Whether it is measured after this step. evaluation: whether there is one after it."""
        every = self.settings.every
        regular = step % every == 0 if every else evaluation
        return bool(self.examples) and (step in (0, last) or regular)

    def measure(self, tokens_per_microbatch: int, say: Callable[[str], None]) -> dict[str, float]:
        """`shift/…` of the policy as it is; nothing where it can't be measured: that is said, and it is not
        tried again.
        """
        if not self.examples or self._failed:
            return {}
        began = time.monotonic()
        try:
            return measure_shift(
                self._model,
                self.examples,
                self.settings,
                sides=data_sides(self.objective),
                stop_ids=self._stop_ids,
                seed=self._seed,
                tokens_per_microbatch=tokens_per_microbatch,
                say=say,
            )
        except Exception as error:  # whatever it is: a diagnostic ends no run
            wrong = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        finally:
            self._spent += time.monotonic() - began
        self._failed = True
        give_back_memory()
        say(f"note: shift/… can't be measured, and is left out from here on: {wrong}")
        return {}

    def taken(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said of a measurement: mostly nothing."""
        lines = self.fading.see(metrics) if metrics else []
        share = self._spent / max(time.monotonic() - self._began, 1e-9)
        if share > DEAR_SHARE and self._spent > DEAR_SECONDS and not self._dear:
            self._dear = True
            lines.append(
                f"note: {share:.0%} of the time so far went into measuring shift/…: fewer shift.prompts or"
                " shift.max_new_tokens, or a larger shift.every, cost less; shift.prompts=0 leaves it out"
            )
        return lines
