"""The recipe of a loop: sample, judge, pair, train, evaluate, and again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from lora_dpo.errors import RecipeError
from lora_dpo.recipe.judging import Judge, Pairing
from lora_dpo.recipe.sampling import Sampling
from lora_dpo.recipe.schema import Recipe
from lora_dpo.recipe.section import Count, CountOrZero, Positive, Section


@dataclass(frozen=True)
class Rounds(Section):
    """Iterative DPO (Xiong et al. 2023, arXiv:2312.11456; Yuan et al. 2024, arXiv:2401.10020): every round's
    pairs are the policy's own responses, judged.

    count: rounds at most. prompts: how many each round samples for, in a random order in which all come once
    before any comes again; all of them by default.
    adapter: "continue" trains last round's adapter further, "fresh" begins each round at the base again.
    reference: "last" is last round's policy, frozen; "base" the base with adapters off. Before the first
    round the last policy is the adapter in adapter.start_from, or the base.
    earlier_pairs: pairs of so many rounds before are trained on too.
    held_out_prompts, held_out_responses: how many held-out prompts are answered after each round, and how
    often, to see its reward, KL divergence, lengths and repetition; at temperature 1 and from all tokens,
    whatever `sampling` says.
    held_out_judge: another judge, as `judge.of` names one, that nothing is trained on: where its reward falls
    while the judge's rises, the judge is being fooled. The other keys of `judge` are its own too.
    patience: the loop ends after so many rounds without a higher held-out reward; 0 never does.
    max_kl: it ends where KL(policy ‖ base), in nats a response, passes this.
    """

    section: ClassVar[str] = "rounds"
    count: Count = 3
    prompts: Count | None = None
    adapter: Literal["continue", "fresh"] = "continue"
    reference: Literal["last", "base"] = "last"
    earlier_pairs: CountOrZero = 0
    held_out_prompts: Count = 128
    held_out_responses: Count = 2
    held_out_judge: str | None = None
    patience: CountOrZero = 1
    max_kl: Positive | None = None


@dataclass(frozen=True)
class IterativeRecipe(Recipe):
    """A `Recipe` for each round's training, and what makes its pairs.

    data names where prompts come from: preference pairs, of which only the prompts are used, or rows with a
    prompt alone. data.eval, eval_fraction or eval_last hold prompts out. run_directory holds all rounds.
    """

    judge: Judge = field(kw_only=True)
    sampling: Sampling = field(default_factory=Sampling, kw_only=True)
    pairing: Pairing = field(default_factory=Pairing, kw_only=True)
    rounds: Rounds = field(default_factory=Rounds, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.responses < 2:
            raise RecipeError("sampling.responses got 1; a pair takes at least 2 responses to a prompt")
        if self.loss.records != "pairs":
            raise RecipeError(
                f"loss is {type(self.loss).__name__}, which trains on {self.loss.records}; rounds make pairs"
            )
        given = {key: getattr(self.reference, key) for key in ("kind", "adapter", "sync_every")}
        if self.judge.of == "implicit" and self.adapter.start_from is None:
            raise RecipeError(
                "judge.of=implicit: the first policy is the base, whose implicit reward is 0 everywhere: name"
                " an adapter to begin with (adapter.start_from), or a run as judge.of=implicit:RUN"
            )
        _ = self.held_out_judge
        taken = [key for key, value in given.items() if value not in ("auto", None)]
        if taken:
            raise RecipeError(f"reference.{taken[0]} is each round's own: rounds.reference chooses it")
        if not (self.data.eval or self.data.eval_fraction or self.data.eval_last):
            raise RecipeError(
                "rounds need held-out prompts to see whether they help: data.eval, eval_fraction or eval_last"
            )

    @property
    def held_out_judge(self) -> Judge | None:
        """The judge that `rounds.held_out_judge` names."""
        if self.rounds.held_out_judge is None:
            return None
        try:
            return replace(self.judge, of=self.rounds.held_out_judge)
        except RecipeError as error:
            raise RecipeError(str(error).replace("judge.of", "rounds.held_out_judge", 1)) from error
