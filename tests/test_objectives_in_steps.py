"""What objectives need from the engine, and how their steps run: exact, whatever the step is packed into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    build,
    float64_model,
    float64_throughout,
    gradient,
    llama_config,
    random_branches,
    relative,
    single_sequence_logprobs,
    with_random_adapter,
)
from transformers import Gemma2Config

from lora_dpo.attention import NAME
from lora_dpo.batching import collate
from lora_dpo.errors import ModelError
from lora_dpo.evaluation import all_logprobs, batch_logprobs, evaluate
from lora_dpo.logprobs import token_divergence, token_logprobs_and_square_sums
from lora_dpo.losses import (
    AOT,
    BCO,
    DPO,
    IPO,
    LDDPO,
    OBJECTIVES,
    TDPO,
    WPO,
    BetaDPO,
    LogProbs,
    Objective,
    Sum,
    weighted,
)
from lora_dpo.model import Model, add_adapter, as_reference
from lora_dpo.recipe import Adapter
from lora_dpo.tokenization import Branches
from lora_dpo.training.step import step_gradient

CAPPED: dict[str, Any] = {"sliding_window": 8, "query_pre_attn_scalar": 16, "head_dim": 16}


def examples(sides: int = 2) -> list[Branches]:
    rng = np.random.default_rng(5)
    shapes = [(9, (5, 8)), (4, (11, 3)), (7, (6, 6)), (12, (2, 9)), (5, (7, 4)), (3, (3, 10))]
    return [random_branches(rng, prefix, rests[:sides], row=n) for n, (prefix, rests) in enumerate(shapes)]


def capped_model() -> Model:
    basic = llama_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept: dict[str, Any] = {k: basic[k] for k in (*names, "num_key_value_heads")}
    return float64_model(Gemma2Config(**kept, **CAPPED, final_logit_softcapping=3.0))


def distributions(model: Model, item: Branches, side: int) -> torch.Tensor:
    """Log-probs of the whole vocabulary where a token of the side is scored [S, V], by the plain model."""
    model.causal.set_attn_implementation("eager")
    try:
        ids = torch.from_numpy(item.side(side).astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(item.scored[side]))
        logits = model.network(input_ids=ids[None], use_cache=False).logits[0]
        return torch.log_softmax(logits[at - 1], dim=-1)
    finally:
        model.causal.set_attn_implementation("lora_dpo_branches")


def every_distribution(model: Model, items: list[Branches]) -> torch.Tensor:
    return torch.cat([distributions(model, item, side) for item in items for side in range(item.sides)])


@pytest.mark.parametrize("tile", [None, (5, 13), (1000, 1)])
@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_the_divergence_of_every_token_and_its_gradient_are_exact(kind: str, tile: tuple[int, int] | None):
    """Against whole distributions by the plain model, in float64, with a random B."""
    items = examples()[:3]
    with float64_throughout():
        model = float64_model(llama_config()) if kind == "plain" else capped_model()
        batch = collate(items, range(3))
        policy, divergence, reference, squares = token_divergence(model, batch, tile=tile)
        (policy.sum() * 0.3 + (divergence * torch.arange(len(divergence))).sum()).backward()
        ours = gradient(model)
        with as_reference(model):
            theirs = every_distribution(model, items)
        mine = every_distribution(model, items)
        expected = (theirs.exp() * (theirs - mine)).sum(dim=-1)
        picked = mine.gather(1, batch.targets[:, None])[:, 0]
        (picked.sum() * 0.3 + (expected * torch.arange(len(expected))).sum()).backward()
    assert (divergence - expected).abs().max() <= 1e-12
    assert (reference - theirs.gather(1, batch.targets[:, None])[:, 0]).abs().max() <= 1e-12
    assert relative(ours, gradient(model)) <= 1e-10
    assert divergence.min() > 0
    assert (squares - torch.logsumexp(2 * mine.detach(), dim=-1)).abs().max() <= 1e-12


def test_square_sums_are_those_of_the_policys_distribution():
    items = examples()[:2]
    with float64_throughout(), torch.no_grad():
        model = capped_model()
        _, squares = token_logprobs_and_square_sums(model, collate(items, range(2)))
        expected = torch.logsumexp(2 * every_distribution(model, items), dim=-1)
    assert (squares - expected).abs().max() <= 1e-12


def test_an_objective_of_distributions_refuses_a_head_that_learns():
    model = float64_model(llama_config())
    model.head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="leave the head out"):
        token_divergence(model, collate(examples(), range(6)))


PAIRED = [name for name, kind in OBJECTIVES.items() if kind().records == "pairs"]
MORE: dict[str, Objective] = {
    "AOT unpaired": AOT(paired=False),
    "LD-DPO of AOT": LDDPO(of=AOT()),
    "all at once": Sum((TDPO(stop_gradient=False), WPO(of=IPO()), BCO()), (1.0, 2.0, 0.5)),
}
STATE = {"shift": 0.1, "2.shift": 0.1, "mean": 0.02, "spread": 0.5, "steps": 2.0}


@pytest.mark.parametrize("name", [*PAIRED, *MORE])
def test_a_steps_gradient_is_that_of_its_loss_in_one_graph_whatever_the_budget(name: str):
    """Float64, random B: the objective called once on log-probs that all carry their graphs."""
    objective = MORE[name] if name in MORE else OBJECTIVES[name]()
    items = examples()
    with float64_throughout():
        model = float64_model(llama_config(), rewards=objective.needs.rewards)
        whole = batch_logprobs(model, objective, collate(items, range(len(items))))
        whole = replace(whole, state=STATE)
        loss = weighted(objective(whole), whole).mean()
        loss.backward()
        expected = gradient(model)
        for budget in (1, 60, 10_000):
            sums = step_gradient(model, objective, items, tokens_per_microbatch=budget, seed=0, state=STATE)
            assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-11)
            assert relative(gradient(model), expected) <= 1e-9
    assert expected.norm() > 1e-6


def test_both_passes_of_a_whole_step_see_the_same_dropout():
    """With dropout the gradient is that of the loss at the log-probs of one draw: β-DPO with nothing left
    out, at its first step, is DPO.
    """
    items = examples()
    network = build(llama_config()).double().requires_grad_(False)
    network.set_attn_implementation(NAME)
    bare = Model(network, None, torch.float64)  # pyright: ignore
    model = with_random_adapter(add_adapter(bare, Adapter(rank=4, dropout=0.5)))
    losses, gradients = [], []
    for objective in (DPO(), BetaDPO(keep=1.0)):
        sums = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=3)
        losses.append(sums.loss.item())
        gradients.append(gradient(model))
    other = step_gradient(model, DPO(), items, tokens_per_microbatch=60, seed=4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert relative(gradients[1], gradients[0]) <= 1e-10
    assert abs(other.loss.item() - losses[0]) > 1e-6, "dropout is at work"


@pytest.mark.parametrize("objective", [AOT(), MORE["all at once"]])
def test_a_whole_step_over_two_processes_has_the_gradient_of_one(objective: Objective):
    items = examples()
    with float64_throughout():
        model = float64_model(llama_config())
        sums = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=0)
        expected = gradient(model)
        shares = [items[0::2], items[1::2]]
        own = [own_logprobs(model, objective, share) for share in shares]
        total, gradients = 0.0, torch.zeros_like(expected)
        for process, share in enumerate(shares):

            def gather(mine: LogProbs, process: int = process) -> tuple[list[LogProbs], int]:
                assert torch.equal(mine.policy, own[process].policy)
                return [mine if p == process else own[p] for p in range(2)], process

            part = step_gradient(
                model, objective, share, totals=own[0].totals, tokens_per_microbatch=60, seed=0, gather=gather
            )
            total += part.loss.item()
            gradients += gradient(model)
    assert total == pytest.approx(sums.loss.item(), rel=1e-12)
    assert relative(gradients, expected) <= 1e-10


def own_logprobs(model: Model, objective: Objective, items: list[Branches]) -> LogProbs:
    from lora_dpo.losses import Totals
    from lora_dpo.training.step import Step, _without_gradient

    everything = examples()
    lengths = tuple(sum(item.scored_count(n) for item in everything) for n in (0, 1))
    totals = Totals(len(everything), lengths)
    return _without_gradient(
        Step(model, objective, items, totals, 0, torch.Tensor.backward, None, {}, None), 60
    )


def test_evaluation_gives_log_probs_in_the_order_of_examples_token_by_token():
    items = examples()
    with float64_throughout(), torch.no_grad():
        model = float64_model(llama_config())
        found = all_logprobs(model, LDDPO(), items, tokens_per_microbatch=40)
        alone = torch.stack([single_sequence_logprobs(model, item) for item in items])
    assert (found.policy - alone).abs().max() <= 1e-10
    tokens = found.by_token
    assert (found.per_sequence(tokens.policy) - alone).abs().max() <= 1e-10
    for example, item in enumerate(items):
        for side in range(2):
            here = tokens.sequences == 2 * example + side
            assert tokens.place[here].tolist() == list(range(item.scored_count(side)))


@pytest.mark.parametrize("name", [*PAIRED, *MORE])
def test_evaluation_gives_the_loss_that_a_step_of_the_same_examples_has(name: str):
    objective = MORE[name] if name in MORE else OBJECTIVES[name]()
    model = float64_model(llama_config(), rewards=objective.needs.rewards)
    items = examples()
    sums = step_gradient(model, objective, items, tokens_per_microbatch=60, seed=0)
    means = evaluate(model, objective, items, tokens_per_microbatch=50, intervals=False).means()
    assert means["loss"] == pytest.approx(sums.loss.item(), rel=1e-9)
