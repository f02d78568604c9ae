"""What an objective is: the log-probs of a step in, one loss an example out. Pure, unreduced, cited.

Legend: `B` examples (pairs, for DPO), `k` sides of an example, `S` scored tokens of all of them.

What an objective needs beyond sums of log-probs it declares as data (`Needs`), and the trainer gives it; the
trainer never asks for an objective's name. The loss of a step is the sum of its examples' losses over their
number, so its gradient does not depend on how they were packed into micro-batches.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError

Positive = Annotated[float, AtLeast(0, exclusive=True)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0, high=1)]
Smoothing = Annotated[float, AtLeast(0, high=0.5)]

DEFAULT_VALUES = {"weight": 1.0, "margin": 0.0}
"""What an example without this value has, beside examples that have it."""

Records = Literal["pairs", "demonstrations", "ratings"]
"""What a row is read as: a pair of responses, one response to learn from, or a rated response."""


@dataclass(frozen=True)
class Needs:
    """What is computed for an objective, and how its step runs.

    reference: reference log-probs. rewards: the scalar rewards of a score head on the policy's adapter, in
    place of all log-probs. tokens: log-probs token by token (`LogProbs.tokens`). square_sum: with them log
    Σ_v p_v² of the policy at each token. divergence: with them KL(reference ‖ policy) at each token,
    differentiable; both distributions are made together, so reference log-probs come from no cache.
    whole_step: the loss of an example depends on the step's others, or on state: a pass without gradients
    first, then the gradient at its log-probs, then every micro-batch again with its share. trained_sides: the
    sides that get a gradient, where others are only looked at (whole_step; with tokens, or adapter dropout,
    all sides run again all the same). ranks: losses belong to ranks among the step's examples, so that no
    example can be weighted.
    """

    reference: bool = True
    tokens: bool = False
    square_sum: bool = False
    divergence: bool = False
    whole_step: bool = False
    trained_sides: tuple[int, ...] | None = None
    ranks: bool = False
    rewards: bool = False

    def __or__(self, other: Needs) -> Needs:
        flags = ("reference", "tokens", "square_sum", "divergence", "whole_step", "ranks", "rewards")
        both = {name: getattr(self, name) or getattr(other, name) for name in flags}
        same = self.trained_sides == other.trained_sides
        return Needs(**both, trained_sides=self.trained_sides if same else None)


@dataclass(frozen=True)
class Totals:
    """A whole step, over all its micro-batches and processes: examples, and scored tokens of each side."""

    examples: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """Scored tokens one by one: float [S] each, those of a sequence in their order.

    policy carries the gradient, and so does divergence. sequences: int64 [S], example · k + side. place:
    int64 [S], how many scored tokens of its sequence stand before it.
    """

    policy: Tensor
    reference: Tensor | None
    sequences: Tensor
    place: Tensor
    square_sum: Tensor | None = None
    divergence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log-probs of B examples with k sides each, summed over scored tokens.

    policy: float64 [B, k], carries the gradient; the rewards of the sides, where those are what the objective
    needs. reference: float64 [B, k] without gradient, or None for an objective that needs none. lengths:
    int64 [B, k], the number of scored tokens. values: the data's own numbers by name, float64 [B]: weight and
    margin of pairs, weight and desirable of ratings. totals: of the step that these belong to; by itself,
    these are the step. state: what the objective returned as `Loss.state` after the last step; empty at the
    start, and in evaluation.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: TokenLogProbs | None = None
    totals: Totals | None = None
    state: Mapping[str, float] = field(default_factory=dict)

    @property
    def log_ratio(self) -> Tensor:
        """log π(side) − log ref(side), [B, k]; β times it is the implicit reward (Rafailov et al. 2023, eq.
        5).
        """
        if self.reference is None:
            raise ValueError("this objective declared that it needs no reference, and then asked for one")
        return self.policy - self.reference

    @property
    def by_token(self) -> TokenLogProbs:
        if self.tokens is None:
            raise ValueError("this objective did not declare that it needs tokens, and then asked for them")
        return self.tokens

    @property
    def step(self) -> Totals:
        if self.totals is not None:
            return self.totals
        return Totals(len(self.lengths), tuple(self.lengths.sum(dim=0).tolist()))

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums of tokens' values [S] by sequence: float64 [B, k]."""
        sums = torch.zeros(self.lengths.numel(), dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.by_token.sequences, values.double()).view(self.lengths.shape)

    def _value(self, name: str) -> Tensor:
        if name in self.values:
            return self.values[name]
        default = DEFAULT_VALUES[name]
        return torch.full((len(self.lengths),), default, dtype=torch.float64, device=self.lengths.device)

    def to(self, device: torch.device | str) -> LogProbs:
        """The same on a device."""
        tensors = {name: getattr(self, name) for name in ("policy", "reference", "lengths")}
        moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
        values = {name: t.to(device) for name, t in self.values.items()}
        tokens = None if self.tokens is None else _each(self.tokens, lambda t: t.to(device))
        return replace(self, **moved, values=values, tokens=tokens)

    def differentiable(self) -> tuple[LogProbs, dict[str, Tensor]]:
        """The same as leaves of a new graph, and those of them that an objective may differentiate."""
        leaves = {"policy": self.policy.detach().requires_grad_()}
        tokens = self.tokens
        if tokens is not None:
            leaves["tokens.policy"] = tokens.policy.detach().requires_grad_()
            tokens = replace(tokens, policy=leaves["tokens.policy"])
            if tokens.divergence is not None:
                leaves["tokens.divergence"] = tokens.divergence.detach().requires_grad_()
                tokens = replace(tokens, divergence=leaves["tokens.divergence"])
        return replace(self, policy=leaves["policy"], tokens=tokens), leaves

    def reordered(self, examples: Sequence[int]) -> LogProbs:
        """With example examples[n] where the n-th is now, for some n of each; tokens keep their order."""
        order = torch.tensor(examples, device=self.lengths.device)
        where = order.argsort()
        tokens = self.tokens
        if tokens is not None:
            sides = self.lengths.shape[1]
            moved = order[tokens.sequences // sides] * sides + tokens.sequences % sides
            tokens = replace(tokens, sequences=moved)
        reference = None if self.reference is None else self.reference[where]
        return replace(
            self,
            policy=self.policy[where],
            reference=reference,
            lengths=self.lengths[where],
            values={name: value[where] for name, value in self.values.items()},
            tokens=tokens,
        )

    @classmethod
    def joined(cls, parts: Sequence[LogProbs]) -> LogProbs:
        """The examples of several parts one after another, their tokens in the same order."""
        first = parts[0]

        def cat(name: str) -> Tensor | None:
            return None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts])

        policy, reference, lengths = (cat(name) for name in ("policy", "reference", "lengths"))
        names = sorted({name for p in parts for name in p.values})
        values = {name: torch.cat([p._value(name) for p in parts]) for name in names}
        tokens = None
        if first.tokens is not None:
            tokens = _joined_tokens([p.by_token for p in parts], [p.lengths.numel() for p in parts])
        assert policy is not None and lengths is not None
        return replace(
            first, policy=policy, reference=reference, lengths=lengths, values=values, tokens=tokens
        )


def _each(tokens: TokenLogProbs, change: Callable[[Tensor], Tensor]) -> TokenLogProbs:
    """Every tensor of them changed."""
    columns = {item.name: getattr(tokens, item.name) for item in dataclasses.fields(tokens)}
    return replace(tokens, **{name: change(t) for name, t in columns.items() if t is not None})


def _joined_tokens(parts: Sequence[TokenLogProbs], sequences: Sequence[int]) -> TokenLogProbs:
    """The tokens of several parts; sequences: how many each part has."""
    starts = itertools.accumulate(sequences, initial=0)
    moved = [replace(p, sequences=p.sequences + n) for p, n in zip(parts, starts, strict=False)]
    columns = {item.name: [getattr(p, item.name) for p in moved] for item in dataclasses.fields(parts[0])}
    return replace(parts[0], **{name: torch.cat(c) for name, c in columns.items() if c[0] is not None})


@dataclass(frozen=True, eq=False)
class Loss:
    """per_example: float [B], differentiable; the step's loss is their sum over its number of examples.

    metrics: name → float [B], detached; the trainer averages them over the step's examples. state: numbers
    that the next step is given as `LogProbs.state`, and that checkpoints keep (whole_step only).
    """

    per_example: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, float | Tensor] = field(default_factory=dict)


class Objective:
    """The base of every objective: a frozen dataclass of numbers, called with log-probs.

    sides: the names of an example's sides. records: what a row of the data is read as. needs: what the
    trainer computes. A class of your own needs `@dataclass(frozen=True)` and `__call__`; numbers annotated
    with a bound (`Positive`) are checked when it is made.
    """

    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    records: ClassVar[Records] = "pairs"
    defined_in: ClassVar[str] = __file__

    def __init_subclass__(cls) -> None:
        # The file whose `class` statement this is: what `recipe.yaml` names where no module can be imported.
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals.get("__name__") in (__name__, "dataclasses"):
            frame = frame.f_back
        cls.defined_in = "" if frame is None else frame.f_code.co_filename
        super().__init_subclass__()

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def needs_reference(self) -> bool:
        return self.needs.reference

    def __call__(self, logprobs: LogProbs) -> Loss:
        raise NotImplementedError(f"{type(self).__name__} has no __call__(logprobs)")

    def __post_init__(self) -> None:
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"{type(self).__name__}: an objective is a dataclass (frozen=True)")
        hints = typing.get_type_hints(type(self), include_extras=True)
        for item in dataclasses.fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name])


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise RecipeError where a number breaks its bound, a word is none of those listed, or what should be an
    objective is none.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is not None or types.NoneType not in options:
            _check(name, value, next(option for option in options if option is not types.NoneType))
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise RecipeError(f"loss.{name} got {value!r}; it takes a tuple")
        for n, item in enumerate(value):
            _check(f"{name}[{n}]", item, options[0])
    elif origin is Annotated:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(options[1], AtLeast) and not (number and options[1].accepts(value)):
            raise RecipeError(f"loss.{name} got {value!r}; it takes a number {options[1]}")
    elif origin is Literal and value not in options:
        raise RecipeError(f"loss.{name} got {value!r}; it takes one of {', '.join(map(str, options))}")
    elif hint is Objective and not isinstance(value, Objective):
        raise RecipeError(f"loss.{name} got {value!r}; it takes an objective, such as DPO()")


def weighted(loss: Loss, logprobs: LogProbs) -> Tensor:
    """Losses of examples [B], each times the weight that its row gives (column `weight`), else 1.

    The sum is divided by the number of examples, not of weights: a weight of 0 leaves a pair out, and leaves
    the others as they were.
    """
    weight = logprobs.values.get("weight")
    return loss.per_example if weight is None else loss.per_example * weight


def reward_metrics(rewards: Tensor) -> dict[str, Tensor]:
    """What is recorded of a pair's rewards, float [B, 2].

    A pair whose rewards tie counts as half right, so that an untrained policy stands at 0.5.
    """
    chosen, rejected = rewards.detach().unbind(1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": preferred(chosen, rejected),
    }


def preference_metrics(rewards: Tensor, logprobs: LogProbs) -> dict[str, Tensor]:
    """What is recorded of a pair: `reward_metrics` of rewards [B, 2], implicit ones such as β times the
    log-ratio, and its log-probs.
    """
    policy = logprobs.policy.detach()
    metrics = reward_metrics(rewards) | {"logps/chosen": policy[:, 0], "logps/rejected": policy[:, 1]}
    if logprobs.reference is not None:
        change = logprobs.log_ratio.detach()
        metrics |= {"logps/chosen_change": change[:, 0], "logps/rejected_change": change[:, 1]}
    return metrics


def preferred(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where chosen is greater, 0 where rejected is, ½ at a tie; what is not a number stays so."""
    difference = chosen - rejected
    return torch.where(difference.isnan(), difference, 0.5 * (torch.sign(difference) + 1))
