"""Objectives equal values worked out by hand, and their gradients equal finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from lora_dpo.errors import RecipeError
from lora_dpo.losses import DPO, SFT, LogProbs, preferred


def logprobs(
    policy: list[list[float]], reference: list[list[float]] | None = None, length: int = 4
) -> LogProbs:
    made = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    ref = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    return LogProbs(made, ref, torch.full(made.shape, length))


def test_dpo_is_the_negative_log_sigmoid_of_the_scaled_difference_of_log_ratios():
    # Log-ratios 2 and -1: margin 0.5 · (2 - -1) = 1.5, and log(1 + exp(-1.5)) = 0.20141…
    loss = DPO(beta=0.5)(logprobs([[-10.0, -20.0]], [[-12.0, -19.0]]))
    assert loss.per_example.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    assert loss.metrics["rewards/chosen"].item() == 1.0
    assert loss.metrics["rewards/rejected"].item() == -0.5
    assert loss.metrics["rewards/margin"].item() == 1.5
    assert loss.metrics["rewards/accuracy"].item() == 1.0
    assert loss.metrics["logps/chosen"].item() == -10.0
    assert loss.metrics["logps/chosen_change"].item() == 2.0
    assert loss.metrics["logps/rejected_change"].item() == -1.0


def test_dpo_at_the_start_is_ln_2_with_accuracy_one_half():
    loss = DPO(beta=0.1)(logprobs([[-3.0, -9.0]], [[-3.0, -9.0]]))
    assert loss.per_example.item() == math.log(2)
    assert loss.metrics["rewards/accuracy"].item() == 0.5


def test_dpo_stays_finite_where_the_margin_is_huge():
    loss = DPO(beta=1.0)(logprobs([[-1e4, 0.0], [0.0, -1e4]], [[0.0, 0.0], [0.0, 0.0]]))
    assert loss.per_example.tolist() == [1e4, 0.0]


def test_dpo_gradient_is_beta_times_sigmoid_of_the_negative_margin():
    given = logprobs([[-10.0, -20.0]], [[-12.0, -19.0]])
    DPO(beta=0.5)(given).per_example.sum().backward()
    weight = 0.5 / (1 + math.exp(1.5))
    assert given.policy.grad is not None
    assert given.policy.grad.tolist() == [[pytest.approx(-weight), pytest.approx(weight)]]


@pytest.mark.parametrize(("objective", "sides"), [(DPO(beta=0.3), 2), (SFT(), 1)])
def test_gradients_equal_finite_differences(objective, sides: int):
    torch.manual_seed(0)
    policy = torch.randn(5, sides, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, sides, dtype=torch.float64)
    lengths = torch.full((5, sides), 3)
    assert torch.autograd.gradcheck(
        lambda p: objective(LogProbs(p, reference, lengths)).per_example, policy, eps=1e-6, rtol=1e-6
    )


def test_sft_divided_by_its_count_is_the_mean_over_the_steps_tokens():
    given = LogProbs(torch.tensor([[-6.0], [-3.0]]), None, torch.tensor([[4], [1]]))
    objective = SFT()
    assert (objective(given).per_example.sum() / objective.count(given.lengths)).item() == pytest.approx(
        9 / 5
    )


def test_a_tie_counts_half():
    assert preferred(torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3)).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), "big"])
def test_beta_must_be_a_positive_number(beta):
    with pytest.raises(RecipeError, match=r"loss\.beta"):
        DPO(beta=beta)


def test_an_objective_that_declared_no_reference_gets_none():
    with pytest.raises(ValueError, match="needs no reference"):
        _ = logprobs([[0.0, 0.0]]).log_ratio
