"""Objectives equal values worked out by hand, and their gradients equal finite differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lora_dpo.errors import RecipeError
from lora_dpo.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    KTO,
    LDDPO,
    NCA,
    OBJECTIVES,
    ORPO,
    RPO,
    SFT,
    SPPO,
    TDPO,
    WPO,
    APODown,
    APOZero,
    BetaDPO,
    ChosenSFT,
    DiscoPOP,
    Hinge,
    LogProbs,
    Loss,
    Objective,
    RobustDPO,
    SimPO,
    Sum,
    TokenLogProbs,
    Totals,
    preferred,
    weighted,
)


def logprobs(
    policy: list[list[float]],
    reference: list[list[float]] | None = None,
    lengths: list[list[int]] | int = 4,
    **given: list[float],
) -> LogProbs:
    made = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    ref = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    sizes = torch.full(made.shape, lengths) if isinstance(lengths, int) else torch.tensor(lengths)
    values = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in given.items()}
    return LogProbs(made, ref, sizes, values)


def loss_of(objective: Objective, given: LogProbs) -> list[float]:
    return objective(given).per_example.tolist()


def wrong(value: Any) -> Any:
    """A value of a type that isn't asked for."""
    return value


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """−log σ(x)"""
    return math.log1p(math.exp(-x))


# Log-ratios 2 and −1; with β = ½ rewards 1 and −½, margin 1.5; lengths 4 and 5.
PAIR = logprobs([[-10.0, -20.0]], [[-12.0, -19.0]], [[4, 5]])
AVERAGE = 0.5 * (2 / 4 + 1 / 5)  # the margin of log-ratios a token

BY_HAND = {
    "DPO": (DPO(beta=0.5), nls(1.5)),
    "cDPO": (DPO(beta=0.5, label_smoothing=0.1), 0.9 * nls(1.5) + 0.1 * nls(-1.5)),
    "DPO a token": (DPO(beta=0.5, average=True), nls(AVERAGE)),
    "forward KL": (DPO(beta=0.5, divergence="forward_kl"), nls(0.5 * (math.exp(1) - math.exp(-2)))),
    "Jensen-Shannon": (
        DPO(beta=0.5, divergence="jensen_shannon"),
        nls(0.5 * (math.log(2 * sigma(2)) - math.log(2 * sigma(-1)))),
    ),
    "α-divergence": (
        DPO(beta=0.5, divergence="alpha", alpha=0.25),
        nls(0.5 * ((1 - math.exp(-0.5)) - (1 - math.exp(0.25))) / 0.25),
    ),
    "IPO": (IPO(beta=0.5), (2 / 4 + 1 / 5 - 1) ** 2),
    "IPO of sums": (IPO(beta=0.5, average=False), (3 - 1) ** 2),
    "hinge": (Hinge(beta=0.2), 1 - 0.6),
    "hinge satisfied": (Hinge(beta=0.5), 0.0),
    "robust": (RobustDPO(beta=0.5, label_smoothing=0.1), (0.9 * nls(1.5) - 0.1 * nls(-1.5)) / 0.8),
    "EXO": (
        EXO(beta=0.5, label_smoothing=0.1),
        sigma(1.5) * math.log(sigma(1.5) / 0.9) + sigma(-1.5) * math.log(sigma(-1.5) / 0.1),
    ),
    "DiscoPOP": (
        DiscoPOP(beta=0.5, tau=0.5),
        (1 - sigma(3)) * nls(1.5) + sigma(3) * math.exp(-1.5),
    ),
    "NCA": (NCA(beta=0.5), nls(1) + 0.5 * nls(-1) + 0.5 * nls(0.5)),
    "SPPO": (SPPO(beta=0.5), (2 - 1) ** 2 + (-1 + 1) ** 2),
    "APO-zero": (APOZero(beta=0.5), 1 - sigma(1) + sigma(-0.5)),
    "APO-down": (APODown(beta=0.5), sigma(1) + 1 - sigma(1.5)),
    "DPOP, chosen likelier": (DPOP(beta=0.5, penalty=5), nls(1.5)),
    "RPO": (RPO(beta=0.5, alpha=0.3), nls(1.5) + 0.3 * 10 / 4),
    "SimPO": (SimPO(beta=2.0, target=0.25), nls(2 * (-10 / 4 + 20 / 5) - 0.5)),
    "CPO": (CPO(beta=0.1, alpha=0.5), nls(1.0) + 0.5 * 2.5),
    "BCO without shift": (BCO(beta=0.5, momentum=None), nls(1) + nls(0.5)),
    "BCO at its first step": (BCO(beta=0.5), nls(1 - 0.25) + nls(0.5 + 0.25)),
    "β-DPO at its first step": (BetaDPO(beta=0.5), nls(1.5)),
    "ChosenSFT": (ChosenSFT(), 10 / 4),
    "Sum": (Sum((DPO(beta=0.5), ChosenSFT()), (2.0, 0.5)), 2 * nls(1.5) + 0.5 * 2.5),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_objective_equals_its_value_by_hand(name: str):
    objective, expected = BY_HAND[name]
    assert loss_of(objective, PAIR) == [pytest.approx(expected, rel=1e-13)]


def test_orpo_is_likelihood_and_the_log_odds_ratio():
    given = logprobs([[-1.0, -2.0]], lengths=[[2, 1]])
    odds = [math.exp(-p) / (1 - math.exp(-p)) for p in (0.5, 2.0)]
    expected = 0.5 + 0.2 * nls(math.log(odds[0] / odds[1]))
    assert loss_of(ORPO(weight=0.2), given) == [pytest.approx(expected, rel=1e-13)]


def test_dpop_fines_a_chosen_response_that_lost_likelihood():
    given = logprobs([[-13.0, -20.0]], [[-12.0, -19.0]])
    assert loss_of(DPOP(beta=0.5, penalty=5), given) == [pytest.approx(nls(-0.5 + 0.5 - 5 * 0.5), rel=1e-13)]


def test_an_offset_asks_for_more_where_the_data_give_a_margin():
    given = replace(PAIR, values={"margin": torch.tensor([2.0], dtype=torch.float64)})
    assert loss_of(DPO(beta=0.5, offset=0.25), given) == [pytest.approx(nls(1.0), rel=1e-13)]
    assert loss_of(IPO(beta=0.5, average=False, offset=0.25), given) == [pytest.approx(1.5**2, rel=1e-13)]
    assert loss_of(DPO(beta=0.5), given) == [pytest.approx(nls(1.5), rel=1e-13)]


def test_a_rows_weight_multiplies_its_loss_alone():
    given = logprobs([[-1.0, -1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]], weight=[0.0, 3.0])
    assert weighted(DPO()(given), given).tolist() == [0.0, pytest.approx(3 * math.log(2))]


def test_parts_of_a_step_join_though_only_some_rows_have_a_weight():
    weighed = logprobs([[-1.0, -2.0]], weight=[3.0])
    joined = LogProbs.joined([logprobs([[-5.0, -6.0]], margin=[0.5]), weighed])
    assert joined.policy.tolist() == [[-5.0, -6.0], [-1.0, -2.0]]
    assert {k: v.tolist() for k, v in joined.values.items()} == {"weight": [1.0, 3.0], "margin": [0.5, 0.0]}


def test_dpo_records_rewards_and_changes():
    metrics = DPO(beta=0.5)(PAIR).metrics
    expected = {"chosen": 1.0, "rejected": -0.5, "margin": 1.5, "accuracy": 1.0}
    assert {name: metrics[f"rewards/{name}"].item() for name in expected} == expected
    assert metrics["logps/chosen"].item() == -10.0
    assert metrics["logps/chosen_change"].item() == 2.0
    assert metrics["logps/rejected_change"].item() == -1.0


AT_THE_START = {
    "DPO": math.log(2),
    "IPO": 25.0,
    "Hinge": 1.0,
    "RobustDPO": math.log(2),
    "EXO": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "DiscoPOP": 0.5 * math.log(2) + 0.5,
    "DPOP": math.log(2),
    "NCA": 2 * math.log(2),
    "SPPO": 50.0,
    "APOZero": 1.0,
    "APODown": 1.0,
    "TDPO": math.log(2),
    "AOT": math.log(2),
    "BCO": 2 * math.log(2),
    "BetaDPO": math.log(2),
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_an_untrained_policy_has_the_objectives_value_at_zero_and_accuracy_one_half(name: str):
    same = [[-3.0, -9.0], [-5.0, -4.0]]
    policy = torch.tensor(same, dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    tokens = TokenLogProbs(
        policy.flatten(), policy.flatten(), torch.arange(4), 0 * torch.arange(4), zeros, zeros
    )
    given = LogProbs(policy, policy, torch.ones(2, 2, dtype=torch.int64), tokens=tokens)
    loss = OBJECTIVES[name]()(given)
    assert loss.per_example.tolist() == [pytest.approx(AT_THE_START[name], rel=1e-14)] * 2
    assert loss.metrics["rewards/accuracy"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "name", ["DPO", "IPO", "Hinge", "RobustDPO", "EXO", "DiscoPOP", "NCA", "BCO", "DPOP"]
)
def test_a_huge_margin_leaves_loss_and_gradient_finite(name: str):
    given = logprobs([[-1e4, 0.0], [0.0, -1e4]], [[0.0, 0.0], [0.0, 0.0]])
    for divergence in ("reverse_kl", "forward_kl", "jensen_shannon", "alpha"):
        objective = OBJECTIVES[name](beta=1.0)  # pyright: ignore[reportCallIssue]
        if hasattr(objective, "divergence"):
            objective = replace(objective, divergence=divergence)  # pyright: ignore[reportArgumentType]
        loss = objective(given).per_example
        (slope,) = torch.autograd.grad(loss.sum(), given.policy)
        assert torch.isfinite(loss).all() and torch.isfinite(slope).all()


def by_token(seed: int, *, examples: int = 4, sides: int = 2) -> LogProbs:
    """Random log-probs of sequences of 2 to 6 tokens, whose policy tokens are leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(2, 7, (examples, sides), generator=generator)
    sequences = torch.repeat_interleave(torch.arange(examples * sides), lengths.flatten())
    place = torch.cat([torch.arange(int(n)) for n in lengths.flatten()])
    total = int(lengths.sum())
    policy, reference = (-normal(total).abs() - 0.2 for _ in range(2))
    tokens = TokenLogProbs(policy, reference, sequences, place, -normal(total).abs(), normal(total).square())
    bare = LogProbs(lengths.double(), lengths.double(), lengths, tokens=tokens)
    values = {"weight": normal(examples).abs(), "margin": normal(examples).abs()}
    values["desirable"] = torch.tensor([1.0, 0.0, 1.0, 0.0][:examples], dtype=torch.float64)
    state = {"shift": 0.1, "mean": 0.05, "spread": 0.3, "steps": 3.0}
    return replace(
        bare,
        policy=bare.per_sequence(policy),
        reference=bare.per_sequence(reference),
        values=values,
        state=state,
    )


EVERY = {
    **{name: kind() for name, kind in OBJECTIVES.items()},
    "IPO, α": IPO(divergence="alpha", alpha=0.3, offset=0.2),
    "AOT unpaired": AOT(paired=False, label_smoothing=0.1),
    "TDPO1": TDPO(alpha=1.0, stop_gradient=False),
    "LD-DPO of IPO": LDDPO(of=IPO(), alpha=0.3),
    "WPO of SimPO": WPO(of=SimPO()),
    "sum of three": Sum((DPO(), BCO(momentum=None), ChosenSFT()), (0.8, 0.2, 1.0)),
    "LD-DPO of a sum": LDDPO(of=Sum((WPO(), TDPO()), (0.5, 0.5))),
}


@pytest.mark.parametrize("name", EVERY)
def test_gradients_equal_finite_differences(name: str):
    """By every token's log-prob and divergence, to 1e-6 relative. What an objective takes as given (weights,
    KL estimates, a stopped gradient) is held fixed, as the paper has it.
    """
    objective = EVERY[name]
    sides = len(objective.sides)
    given = by_token(1, sides=sides)
    first = given.by_token
    assert first.divergence is not None

    def losses(policy: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        seen = replace(first, policy=policy, divergence=divergence)
        return weighted_sum(objective, replace(given, policy=given.per_sequence(policy), tokens=seen))

    inputs = tuple(x.clone().requires_grad_() for x in (first.policy, first.divergence))
    found = torch.autograd.grad(losses(*inputs), inputs, allow_unused=True)
    frozen = Held(objective, given)
    for n, (slope, name_of) in enumerate(zip(found, ("policy", "divergence"), strict=True)):
        for place in range(len(inputs[n])):
            numeric = frozen.difference(name_of, place)
            analytic = 0.0 if slope is None else slope[place].item()
            assert analytic == pytest.approx(numeric, rel=1e-6, abs=1e-9), (name_of, place)


def weighted_sum(objective: Objective, given: LogProbs) -> torch.Tensor:
    if isinstance(objective, AOT):
        given = replace(given, values={})
    return weighted(objective(given), given).sum()


class Held:
    """Central differences of a loss, with what the objective detaches held at its value here.

    `Tensor.detach` is what marks it: in a changed call the n-th detached tensor is that of the first call.
    """

    def __init__(self, objective: Objective, given: LogProbs):
        self.objective, self.given = objective, given
        self.kept: list[torch.Tensor] = []
        self._call(given, lambda tensor: self.kept.append(tensor.clone()) or tensor)

    def difference(self, name: str, place: int, step: float = 1e-5) -> float:
        values = []
        for sign in (1, -1):
            tokens = self.given.by_token
            changed = getattr(tokens, name).clone()
            changed[place] += sign * step
            tokens = replace(tokens, **{name: changed})
            given = replace(self.given, policy=self.given.per_sequence(tokens.policy), tokens=tokens)
            kept = iter(self.kept)
            values.append(self._call(given, lambda tensor, kept=kept: next(kept)))
        return (values[0] - values[1]) / (2 * step)

    def _call(self, given: LogProbs, detach) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", detach)
            total = weighted_sum(self.objective, given)
        return float(total)


def test_sft_is_the_mean_over_the_steps_tokens():
    given = logprobs([[-6.0], [-3.0]], lengths=[[4], [1]])
    assert SFT()(given).per_example.mean().item() == pytest.approx(9 / 5)
    # A micro-batch of a step of 4 examples and 20 tokens: its share is 9 / 20.
    part = replace(given, totals=Totals(4, (20,)))
    assert SFT()(part).per_example.sum().item() / 4 == pytest.approx(9 / 20)


def test_aot_compares_sorted_values_of_the_step():
    given = logprobs([[5.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [3.0, 0.0]])
    # Sorted: policy 1, 5; reference 2, 3.
    assert loss_of(AOT(beta=1.0), given) == [pytest.approx(nls(-1)), pytest.approx(nls(2))]
    # Log-ratios: chosen 3, −2 sorted −2, 3; rejected 0, 0.
    assert loss_of(AOT(beta=1.0, paired=False), given) == [pytest.approx(nls(-2)), pytest.approx(nls(3))]


def test_aot_refuses_weights():
    given = logprobs([[5.0, 0.0]], [[2.0, 0.0]], weight=[2.0])
    with pytest.raises(RecipeError, match="weight means nothing"):
        AOT()(given)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WPO(of=wrong("DPO")), r"loss\.of got 'DPO'; it takes an objective"),
        (lambda: LDDPO(of=wrong(DPO)), r"loss\.of got .*it takes an objective"),
        (lambda: LDDPO(of=SFT()), "is for demonstrations, not pairs"),
        (lambda: WPO(of=KTO()), "is for ratings, not pairs"),
        (lambda: Sum(wrong((DPO, IPO())), (1.0, 1.0)), r"loss\.terms\[0\]"),
        (lambda: Sum(wrong(DPO()), wrong(1.0)), r"loss\.terms"),
        (lambda: Sum((DPO(), IPO()), (1.0, math.nan)), r"loss\.weights\[1\] got nan"),
        (lambda: BCO(momentum=5), r"loss\.momentum got 5"),
    ],
)
def test_objectives_around_objectives_are_checked_when_they_are_made(make, words: str):
    with pytest.raises(RecipeError, match=words):
        make()


def test_beta_dpo_waits_for_a_spread_before_it_leaves_pairs_out():
    nothing = logprobs([[0.0, 0.0]] * 5, [[0.0, 0.0]] * 5)
    first = BetaDPO()(nothing).state
    apart = logprobs([[1.0 * n, 0.0] for n in range(5)], [[0.0, 0.0]] * 5)
    second = BetaDPO()(replace(apart, state={k: float(v) for k, v in first.items()}))
    assert (second.per_example > 0).all()
    assert float(second.state["spread"]) == pytest.approx(0.1 * math.sqrt(2)) and second.state["steps"] == 2


def test_wpo_refuses_losses_of_ranks():
    with pytest.raises(RecipeError, match=r"loss\.of got AOT, which compares ranks"):
        WPO(of=AOT())
    with pytest.raises(RecipeError, match=r"loss\.of got Sum"):
        WPO(of=Sum((DPO(), AOT()), (1.0, 1.0)))


def test_kto_weighs_each_rating_against_the_kl_of_mismatched_responses():
    given = logprobs([[-1.0, -4.0], [-3.0, -2.0]], [[-2.0, -5.0], [-2.0, -2.5]], desirable=[1.0, 0.0])
    # Log-ratios 1 and −1; mismatched 1 and ½, so z = ¾.
    objective = KTO(beta=0.4, desirable=1.5, undesirable=0.5)
    expected = [1.5 * (1 - sigma(0.4 * 0.25)), 0.5 * (1 - sigma(0.4 * 1.75))]
    assert loss_of(objective, given) == [pytest.approx(x, rel=1e-13) for x in expected]
    metrics = objective(given).metrics
    assert metrics["kl"].tolist() == [0.75, 0.75]
    assert metrics["rewards/desirable"].mean().item() == pytest.approx(0.4)
    assert metrics["rewards/undesirable"].mean().item() == pytest.approx(-0.4)


def test_ktos_kl_is_never_below_zero_and_carries_no_gradient():
    given = logprobs([[-1.0, -9.0]], [[-2.0, -5.0]], desirable=[1.0])
    loss = KTO(beta=1.0)(given)
    assert loss.per_example.tolist() == [pytest.approx(1 - sigma(1.0))]
    loss.per_example.sum().backward()
    assert given.policy.grad is not None and given.policy.grad[0, 1] == 0 and given.policy.grad[0, 0] < 0


def test_bcos_shift_moves_with_the_steps():
    first = BCO(beta=0.5, momentum=0.8)(PAIR)
    assert float(first.state["shift"]) == pytest.approx(0.25)
    later = replace(logprobs([[-11.0, -20.0]], [[-12.0, -19.0]]), state={"shift": 0.25})
    # Rewards ½ and −½, mean 0: 0.8 · 0.25.
    second = BCO(beta=0.5, momentum=0.8)(later)
    assert float(second.state["shift"]) == pytest.approx(0.2)
    assert second.per_example.tolist() == [pytest.approx(nls(0.3) + nls(0.7))]


def test_beta_dpo_follows_the_gap_between_its_pairs():
    policy = [[2.0 * n, 0.0] for n in range(1, 6)]
    given = logprobs(policy, [[0.0, 0.0]] * 5)
    objective = BetaDPO(beta=0.5, alpha=0.6, keep=1.0, momentum=0.9)
    first = objective(given)
    assert {k: float(v) for k, v in first.state.items()} == pytest.approx(
        {"mean": 3.0, "spread": math.sqrt(2), "steps": 1.0}
    )
    again = objective(replace(given, state={"mean": 2.0, "spread": 1.0, "steps": 1.0}))
    scale = 1 + 0.6 * (3.0 - 2.0)
    assert again.per_example.tolist() == [pytest.approx(nls(scale * n)) for n in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert float(again.state["mean"]) == pytest.approx(2.1)


def test_beta_dpo_leaves_out_odd_pairs_and_keeps_the_mean():
    policy = [[0.1 * n, 0.0] for n in range(9)] + [[500.0, 0.0]]
    given = logprobs(policy, [[0.0, 0.0]] * 10)
    state = {"mean": 0.2, "spread": 0.2, "steps": 1.0}
    dropped = set()
    for step in range(20):
        loss = BetaDPO(beta=0.5)(replace(given, state={**state, "steps": float(step)})).per_example
        left_out = (loss == 0).nonzero()[:, 0].tolist()
        assert len(left_out) == 2 and 9 in left_out
        dropped |= set(left_out)
    assert len(dropped) > 4, "which others are left out is drawn anew each step"


def two_sided(policy: list[list[float]], reference: list[list[float]], **more) -> LogProbs:
    """One pair, token by token."""
    flat, ref = (torch.tensor([*x[0], *x[1]], dtype=torch.float64) for x in (policy, reference))
    sizes = [len(side) for side in policy]
    sequences = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    place = torch.cat([torch.arange(n) for n in sizes])
    more = {name: torch.tensor([*x[0], *x[1]], dtype=torch.float64) for name, x in more.items()}
    tokens = TokenLogProbs(flat, ref, sequences, place, **more)
    sums = [[sum(side) for side in x] for x in (policy, reference)]
    given = logprobs([sums[0]], [sums[1]], [sizes])
    return replace(given, tokens=tokens)


def test_ld_dpo_counts_what_is_beyond_the_other_responses_length_less():
    given = two_sided([[-1.0, -2.0, -3.0], [-4.0]], [[-2.0, -2.0, -5.0], [-3.0]])
    # Shared: one token each. Chosen: ratio 1 + ¼ (0 + 2); rejected −1.
    assert loss_of(LDDPO(of=DPO(beta=0.5), alpha=0.25), given) == [pytest.approx(nls(0.5 * 2.5), rel=1e-13)]
    assert loss_of(LDDPO(of=DPO(beta=0.5), alpha=1.0), given) == loss_of(DPO(beta=0.5), given)


def test_wpo_weighs_a_pair_by_how_likely_the_policy_would_say_it():
    given = two_sided([[-1.0, -2.0], [-4.0]], [[-2.0, -2.0], [-3.0]], square_sum=[[-0.5, -0.7], [-1.0]])
    weight = math.exp((-0.5 - 1.3) / 2) * math.exp(-3.0)
    assert loss_of(WPO(of=DPO(beta=0.5)), given) == [pytest.approx(weight * nls(1.0), rel=1e-13)]


def test_tdpo_takes_off_how_far_rejected_responses_drift_from_the_reference():
    given = two_sided([[-1.0, -2.0], [-4.0]], [[-2.0, -2.0], [-3.0]], divergence=[[0.1, 0.2], [0.7]])
    # Margin ½ · 2; δ = ½ (0.7 − 0.3).
    loss = TDPO(beta=0.5, alpha=0.5)(given)
    assert loss.per_example.tolist() == [pytest.approx(nls(1.0 - 0.5 * 0.2), rel=1e-13)]
    assert loss.metrics["kl/rejected"].tolist() == [pytest.approx(0.7)]


def test_a_sum_keeps_the_state_of_each_term_apart():
    both = Sum((BCO(beta=0.5), BCO(beta=1.0)), (1.0, 1.0))
    state = both(PAIR).state
    assert {k: float(v) for k, v in state.items()} == pytest.approx({"0.shift": 0.25, "1.shift": 0.5})
    assert both.needs.whole_step


def test_a_sum_refuses_objectives_of_different_data_and_missing_weights():
    with pytest.raises(RecipeError, match="different data"):
        Sum((DPO(), SFT()), (1.0, 1.0))
    with pytest.raises(RecipeError, match=r"loss\.weights got 1 numbers for 2"):
        Sum((DPO(), IPO()), (1.0,))


def test_a_tie_counts_half():
    assert preferred(torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3)).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), "big", True])
def test_beta_must_be_a_positive_number(beta):
    for kind in (DPO, IPO, NCA, KTO, SimPO):
        with pytest.raises(RecipeError, match=r"loss\.beta"):
            kind(beta=beta)


def test_bounds_and_words_are_checked_when_an_objective_is_made():
    with pytest.raises(RecipeError, match=r"loss\.label_smoothing got 0.7"):
        DPO(label_smoothing=0.7)
    with pytest.raises(RecipeError, match=r"loss\.divergence got 'kl'; it takes one of reverse_kl"):
        DPO(divergence="kl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=r"loss\.label_smoothing got 0\.0"):
        EXO(label_smoothing=0.0)


def test_an_objective_that_declared_no_reference_or_tokens_gets_none():
    with pytest.raises(ValueError, match="needs no reference"):
        _ = logprobs([[0.0, 0.0]]).log_ratio
    with pytest.raises(ValueError, match="did not declare that it needs tokens"):
        _ = logprobs([[0.0, 0.0]]).by_token


def test_an_objective_of_ones_own_is_a_small_class():
    @dataclass(frozen=True)
    class Mine(Objective):
        beta: float = 0.5

        def __call__(self, logprobs: LogProbs) -> Loss:
            ratio = self.beta * logprobs.log_ratio
            return Loss((ratio[:, 0] - ratio[:, 1] - 1) ** 2)

    assert loss_of(Mine(), PAIR) == [pytest.approx(0.25)]
    assert Mine().needs.reference and Mine().sides == ("chosen", "rejected")
