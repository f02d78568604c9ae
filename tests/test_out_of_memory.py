"""When memory runs out a step begins again in smaller pieces, with the same mathematics, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import build, gradient, llama_config, random_branches, with_random_adapter

from lora_dpo.attention import NAME
from lora_dpo.batching import cost
from lora_dpo.errors import PreflightError, RunError
from lora_dpo.evaluation import evaluate
from lora_dpo.losses import BCO, DPO, TDPO, LogProbs, Objective, Sum
from lora_dpo.model import Model, add_adapter
from lora_dpo.out_of_memory import is_out_of_memory
from lora_dpo.recipe import Adapter, Recipe, Training, override
from lora_dpo.reference import ReferenceCache
from lora_dpo.tokenization import Branches
from lora_dpo.training import preflight, step_gradient, train
from lora_dpo.training.optimizer import allocate, make_optimizer, optimizer_state, whole_update

STEP, CACHE = import_module("lora_dpo.training.step"), import_module("lora_dpo.reference.cache")
EVALUATION = import_module("lora_dpo.evaluation")
OBJECTIVES: dict[str, Objective] = {
    "by micro-batch": DPO(),
    "whole step": BCO(),
    "whole step, by token": Sum((TDPO(stop_gradient=False), BCO()), (1.0, 0.5)),
}
PASSES = [
    *((name, where) for name in OBJECTIVES for where in ("forward", "backward")),
    *((name, "replay") for name, objective in OBJECTIVES.items() if objective.needs.whole_step),
    *((name, "reference") for name, objective in OBJECTIVES.items() if not objective.needs.divergence),
]
"""Each objective's passes over its micro-batches."""

STATE = {"shift": 0.1, "1.shift": 0.1}
BUDGET = 120


def examples(count: int = 6) -> list[Branches]:
    rng = np.random.default_rng(5)
    return [random_branches(rng, 9, (8 + n, 12 - n), row=n + 1) for n in range(count)]


@pytest.fixture
def model() -> Model:
    """With dropout, so that a draw that isn't rewound shows."""
    torch.manual_seed(0)
    network = build(llama_config()).double().requires_grad_(False)
    network.set_attn_implementation(NAME)
    bare = Model(network, None, torch.float64)  # pyright: ignore[reportArgumentType]
    return with_random_adapter(add_adapter(bare, Adapter(rank=4, dropout=0.3)))


class Fails:
    """A function that runs out of memory once: the n-th time that it is called as asked."""

    def __init__(
        self, genuine: Callable[..., Any], at: int, when: Callable[..., bool] = lambda *a, **k: True
    ):
        self.genuine, self.left, self.when = genuine, at, when

    def __call__(self, *given: Any, **named: Any) -> Any:
        made = self.genuine(*given, **named)
        if self.when(*given, **named):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("simulated")
        return made


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "Error: out of memory at line 380 in file /src/csrc/ops.cu",
        "std::bad_alloc",
    ],
)
def test_memory_that_runs_out_is_known_by_all_its_names(message: str):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message)), "somebody else's words"


def test_other_errors_are_not_taken_for_it():
    assert is_out_of_memory(MemoryError())
    for text in ("mat1 and mat2 shapes cannot be multiplied", "CUDA error: device-side assert triggered"):
        assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(("name", "where"), PASSES)
def test_a_step_that_ran_out_anywhere_is_to_the_bit_one_that_began_with_the_smaller_budget(
    name: str, where: str, model: Model, monkeypatch: pytest.MonkeyPatch
):
    """Gradient, loss, state and what the cache holds, with dropout."""
    objective, items, said = OBJECTIVES[name], examples(), []
    cached = not objective.needs.divergence
    backward: Any = torch.Tensor.backward
    with monkeypatch.context() as patch:
        if where == "backward":
            backward = Fails(backward, 2)
        elif where == "reference":
            patch.setattr(CACHE, "reference_logprobs", Fails(CACHE.reference_logprobs, 2))
        else:
            replays = where == "replay"
            fails = Fails(STEP.batch_logprobs, 2, lambda *a, **k: k.get("policy_only", False) == replays)
            patch.setattr(STEP, "batch_logprobs", fails)
        with ReferenceCache.open(model) as cache:
            first = step_gradient(
                model,
                objective,
                items,
                tokens_per_microbatch=BUDGET,
                seed=3,
                cache=cache if cached else None,
                state=STATE,
                backward=backward,
                say=said.append,
            )
            counts = cache.hits, cache.misses
    retried = gradient(model)
    assert first.out_of_memory_retries == len(said) == 1
    assert f"{first.tokens_per_microbatch} tokens a micro-batch" in said[0]
    assert first.tokens_per_microbatch < BUDGET
    with ReferenceCache.open(model) as cache:
        again = step_gradient(
            model,
            objective,
            items,
            tokens_per_microbatch=first.tokens_per_microbatch,
            seed=3,
            cache=cache if cached else None,
            state=STATE,
        )
        assert (cache.hits, cache.misses) == counts
    assert torch.equal(gradient(model), retried)
    assert torch.equal(first.loss, again.loss)
    assert {k: float(v) for k, v in first.state.items()} == {k: float(v) for k, v in again.state.items()}


def test_a_process_that_begins_a_step_again_meets_the_others_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    """The others wait at no second meeting: one would never end."""
    met = []

    def gather(own: LogProbs) -> tuple[list[LogProbs], int]:
        met.append(own)
        return [own, own], 1

    items = examples()
    fails = Fails(STEP.batch_logprobs, 2, lambda *a, **k: k.get("policy_only", False))
    monkeypatch.setattr(STEP, "batch_logprobs", fails)
    sums = step_gradient(
        model, BCO(), items, tokens_per_microbatch=BUDGET, seed=0, state=STATE, gather=gather, say=[].append
    )
    assert sums.out_of_memory_retries == 1 and len(met) == 1


def test_an_example_that_does_not_fit_alone_is_named(model: Model, monkeypatch: pytest.MonkeyPatch):
    items = examples()
    longest = max(items, key=lambda item: cost([item]))

    def failing(*given: Any, **named: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(STEP, "batch_logprobs", failing)
    with pytest.raises(RunError, match=rf"{cost([longest])} tokens, random row \d+.*data\.max_tokens"):
        step_gradient(model, DPO(), items, tokens_per_microbatch=BUDGET, seed=0, say=[].append)


def test_evaluation_goes_on_with_smaller_micro_batches_and_the_same_metrics(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    items, said, genuine = examples(), [], EVALUATION.batch_logprobs
    whole = evaluate(model, BCO(), items, tokens_per_microbatch=BUDGET).means()
    seen: list[int] = []

    def failing(model: Model, objective: Any, batch: Any, *given: Any) -> Any:
        if len(batch.examples) > 1 and seen:
            raise torch.OutOfMemoryError("simulated")
        return genuine(model, objective, batch, *given)

    monkeypatch.setattr(EVALUATION, "batch_logprobs", failing)
    means = evaluate(
        model, BCO(), items, tokens_per_microbatch=BUDGET, progress=seen.append, say=said.append
    ).means()
    assert sum(seen) == len(items) and seen[0] > 1, "what was done before is not done again"
    assert said and "while evaluating" in said[0]
    assert means == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(EVALUATION, "batch_logprobs", Fails(genuine, 1, lambda *a: True))
    with pytest.raises(RunError, match=r"random row 1\).*data\.max_tokens"):
        evaluate(model, BCO(), items[:1], tokens_per_microbatch=1, say=[].append)


def test_preflight_rehearses_evaluation_and_gives_the_optimizer_its_moments(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    model.starts_as_reference = False
    items, said = examples(), []
    rng = np.random.default_rng(1)
    held_out = [random_branches(rng, 40, (20, 20), row=77), *examples(1)]
    optimizer = make_optimizer(Training(), model.trainable)

    def check() -> None:
        preflight(
            model,
            DPO(),
            items,
            examples_per_step=4,
            tokens_per_microbatch=200,
            held_out=held_out,
            optimizer=optimizer,
            say=said.append,
        )

    check()
    assert "the longest held-out example (80 tokens) fits" in said
    assert all(optimizer.state[p] for p in model.trainable.values())
    genuine = EVALUATION.batch_logprobs

    def failing(model: Model, objective: Any, batch: Any, *given: Any) -> Any:
        if batch.tokens == 80:
            raise RuntimeError("CUDA error: out of memory")
        return genuine(model, objective, batch, *given)

    monkeypatch.setattr(EVALUATION, "batch_logprobs", failing)
    with pytest.raises(PreflightError, match=r"evaluation.*80 tokens, random row 77.*data\.max_tokens"):
        check()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_that_has_its_moments_beforehand_updates_to_the_bit_as_one_that_makes_them(kind: str):
    updated = []
    for before in (False, True):
        torch.manual_seed(0)
        shapes = {"a.lora_A.": (8, 640), "a.lora_B.": (640, 8)}  # 8-bit moments from 4,096 values on
        parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        training = Training(optimizer=kind, weight_decay=0.1)  # pyright: ignore[reportArgumentType]
        optimizer = make_optimizer(training, parameters, lora_plus_ratio=4)
        if before:
            allocate(optimizer, parameters)
            assert optimizer_state(optimizer, parameters)[0]
        for _ in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        updated.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    assert torch.equal(*updated)


def test_memory_that_runs_out_within_an_update_ends_the_run_in_words():
    with pytest.raises(RunError, match=r"part may be updated.*--resume"), whole_update():
        raise torch.OutOfMemoryError("simulated")
    with pytest.raises(RuntimeError, match="another"), whole_update():
        raise RuntimeError("another")


def test_a_run_shows_the_retry_says_it_and_keeps_the_smaller_budget(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = override(recipe, ["training.max_steps=3"])
    monkeypatch.setattr(STEP, "batch_logprobs", Fails(STEP.batch_logprobs, 4))
    run = train(recipe)
    steps = [r for r in run.records() if r["kind"] == "step"]
    assert sum(r["out_of_memory_retries"] for r in steps) == 1
    at = next(n for n, r in enumerate(steps) if r["out_of_memory_retries"])
    assert [r["tokens_per_microbatch"] < 400 for r in steps] == [n >= at for n in range(3)]
    assert "out of memory: this step begins again" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
def test_where_the_system_gives_no_more_memory_a_step_begins_again_and_is_right():
    """No simulation: malloc fails at 30 MiB more than the process has, where one micro-batch needs 100."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "limited_memory.py"), "30"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    retries, budget, difference = done.stdout.split()[:3]
    assert int(retries) >= 1 and int(budget) < 8 * 260
    assert float(difference) <= 1e-5
    assert "out of memory" in done.stdout
