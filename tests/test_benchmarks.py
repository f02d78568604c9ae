"""The benchmarks start, and what they compare is the same work; they are run by hand, and TRL is not needed
here.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from builders import random_branches, small_tokenizer
from roofline import counted_flops
from workload import (
    Shape,
    as_columns,
    distinct_tokens,
    quantized_in_memory,
    representable,
    scored_tokens,
    sequence_tokens,
    synthetic_pairs,
)

from lora_dpo import ChatTokenizer
from lora_dpo.preferences import Message, Preference, Where


@pytest.mark.parametrize(
    "name",
    ["compare_trl", "scaling", "roofline", "merge_dtypes", "reward_accuracy", "sampling", "iterative_dpo"],
)
def test_the_scripts_start(name: str, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "Columns:" in capsys.readouterr().out


def test_the_columns_hold_the_very_sequences_and_scored_tokens_of_the_branches():
    chat = ChatTokenizer(small_tokenizer(), max_tokens=200)
    ask: tuple[Message, ...] = ({"role": "user", "content": "the cat"},)
    chosen: tuple[Message, ...] = ({"role": "assistant", "content": "the dog ate"},)
    rejected: tuple[Message, ...] = ({"role": "assistant", "content": "the dog sat on the mat"},)
    whole = chat.branches(Preference(ask, chosen, rejected, Where("test", 1)))
    pair = representable(whole)
    assert pair is not None
    check_columns(pair)
    # Nothing that is scored was left out, and no token before it.
    assert [pair.scored_count(side) for side in (0, 1)] == [whole.scored_count(side) for side in (0, 1)]
    for side in (0, 1):
        assert np.array_equal(pair.side(side), whole.side(side)[: len(pair.side(side))])


def test_synthetic_pairs_have_the_size_they_were_asked_for():
    pairs = synthetic_pairs(3, 10, 20, vocabulary=97)
    assert distinct_tokens(pairs) == 3 * (10 + 2 * 20)
    assert sequence_tokens(pairs) == 3 * 2 * (10 + 20)
    assert scored_tokens(pairs) == 3 * 2 * 20
    for pair in pairs:
        check_columns(pair)


def check_columns(pair) -> None:
    columns = as_columns(pair)
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        assert columns["prompt_ids"] + columns[name] == pair.side(side).tolist()
        assert len(columns[name]) == pair.scored_count(side)


def test_a_pair_whose_scored_tokens_are_no_single_run_is_left_out():
    pair = random_branches(np.random.default_rng(0), 4, (6, 8))
    assert representable(pair) is not None
    pair.scored[1][7] = False
    assert representable(pair) is None


def test_the_counted_parameters_are_those_of_the_model():
    shape = Shape(64, 2, 4, 2, 128, 96)
    network = quantized_in_memory(shape, torch.device("cpu"))
    linear = [module for name, module in network.named_modules() if name.endswith("_proj")]
    assert len(linear) == 2 * 7
    assert shape.non_embedding_parameters == sum(m.in_features * m.out_features for m in linear)
    assert shape.parameters - shape.non_embedding_parameters == 2 * 96 * 64
    assert shape.config().vocab_size == 96
    logits = network(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits
    assert logits.isfinite().all() and logits.shape == (1, 3, 96)


def test_counted_flops_by_hand():
    shape = Shape(64, 2, 4, 2, 128, 96)
    # q and o 64 × 64, k and v 64 × 32, three of 64 × 128, in 2 layers.
    parameters = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert counted_flops(shape, tokens=10, rows=3) == (6 * parameters * 10, 6 * 96 * 64 * 3)
