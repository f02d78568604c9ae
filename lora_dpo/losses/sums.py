"""A weighted sum of objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from torch import Tensor

from lora_dpo.errors import RecipeError
from lora_dpo.losses.margin import DPO
from lora_dpo.losses.objective import LogProbs, Loss, Needs, NotNegative, Objective, Records
from lora_dpo.losses.paired import ChosenSFT


@dataclass(frozen=True)
class Sum(Objective):
    """Σ weight · objective, of objectives of the same data: MPO (Wang et al. 2024, arXiv:2411.10442, eq. 3)
    is DPO, BCO and the chosen response's SFT with weights 0.8, 0.2 and 1.

    terms: the objectives. weights: one each.
    """

    terms: tuple[Objective, ...] = (DPO(), ChosenSFT())
    weights: tuple[NotNegative, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("terms", "weights"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        if not self.terms or len(self.terms) != len(self.weights):
            counts = f"{len(self.weights)} numbers for {len(self.terms)} loss.terms"
            raise RecipeError(f"loss.weights got {counts}; give one each")
        kinds = {(term.sides, term.records) for term in self.terms}
        if len(kinds) > 1:
            names = ", ".join(type(term).__name__ for term in self.terms)
            raise RecipeError(f"loss.terms got {names}, which are for different data")
        if len({term.needs.rewards for term in self.terms}) > 1:
            names = ", ".join(type(term).__name__ for term in self.terms)
            raise RecipeError(
                f"loss.terms got {names}, of which some look at the rewards of a score head and others at"
                " log-probs: train one of both"
            )

    @property
    def sides(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.terms[0].sides

    @property
    def records(self) -> Records:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.terms[0].records

    @property
    def needs(self) -> Needs:
        return reduce(or_, (term.needs for term in self.terms))

    def __call__(self, logprobs: LogProbs) -> Loss:
        total: Tensor | float = 0.0
        metrics: dict[str, Tensor] = {}
        state: dict[str, float | Tensor] = {}
        for n, (term, weight) in enumerate(zip(self.terms, self.weights, strict=True)):
            mark = f"{n}."
            own = {k.removeprefix(mark): v for k, v in logprobs.state.items() if k.startswith(mark)}
            loss = term(replace(logprobs, state=own))
            total = total + weight * loss.per_example
            # The first to name a metric gives it: rewards are those of the first objective that has them.
            name = f"loss/{n}_{type(term).__name__}"
            metrics = {**loss.metrics, **metrics, name: loss.per_example.detach()}
            state |= {mark + k: v for k, v in loss.state.items()}
        assert isinstance(total, Tensor)
        return Loss(total, metrics, state)
