"""Packing keeps every token once, and a step's examples are a function of (seed, step)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from builders import random_branches
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.batching import StepSampler, collate, pack

sizes = st.lists(
    st.tuples(st.integers(1, 60), st.tuples(st.integers(1, 40), st.integers(1, 40))), min_size=1, max_size=20
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(sizes, st.integers(1, 300))
def test_every_example_is_packed_once_without_padding_and_within_the_budget(shapes, budget: int):
    rng = np.random.default_rng(0)
    items = [random_branches(rng, prefix, rests) for prefix, rests in shapes]
    batches = list(pack(items, budget))
    assert sorted(n for batch in batches for n in batch.examples) == list(range(len(items)))
    for batch in batches:
        assert batch.tokens == sum(items[n].tokens for n in batch.examples)
        assert batch.tokens <= budget or len(batch.examples) == 1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(sizes)
def test_score_rows_name_each_scored_token_and_the_position_before_it(shapes):
    rng = np.random.default_rng(1)
    items = [random_branches(rng, prefix, rests) for prefix, rests in shapes]
    batch = collate(items, range(len(items)))
    assert batch.scored_lengths().tolist() == [[int(mask.sum()) for mask in item.scored] for item in items]
    row = 0
    for item in items:
        for side in range(2):
            ids = item.side(side)
            for at in np.flatnonzero(item.scored[side]):
                assert batch.targets[row] == ids[at]
                assert batch.token_ids[batch.score_positions[row]] == ids[at - 1]
                assert batch.positions[batch.score_positions[row]] == at - 1
                row += 1
    assert row == len(batch.targets)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(sizes, st.none() | st.integers(1, 30))
def test_each_blocks_mask_is_the_plain_definition_of_who_sees_whom(shapes, window: int | None):
    rng = np.random.default_rng(2)
    layout = collate([random_branches(rng, p, r) for p, r in shapes], range(len(shapes))).layout
    example, branch, position = (t.tolist() for t in (layout.example, layout.branch, layout.position))
    covered = Counter()
    for blocks in (layout.blocks, layout.separate_blocks):
        for block in blocks:
            covered.update(range(block.start, block.stop))
            keys = [k for span in block.key_spans for k in range(*span)]
            mask = layout.mask(block, window)
            for i, q in enumerate(range(block.start, block.stop)):
                expected = {
                    k
                    for k in range(len(example))
                    if example[k] == example[q]
                    and branch[k] in (0, branch[q])
                    and 0 <= position[q] - position[k] < (window or 10**9)
                }
                assert {keys[j] for j in torch.nonzero(mask[i]).flatten().tolist()} == expected
    assert set(covered.values()) == {2}, "each query belongs to exactly one block, both ways of cutting"


def test_variable_length_arguments_give_the_attention_that_the_masks_give():
    """What the CUDA call is told, against a plain causal attention over each gathered sequence."""
    rng = np.random.default_rng(3)
    layout = collate([random_branches(rng, 5, (3, 4)), random_branches(rng, 0, (2, 6))], range(2)).layout
    index, cu_q, cu_k, max_q, max_k = layout.varlen
    assert (max_q, max_k) == (8, 9)
    queries = 0
    for n, block in enumerate(layout.separate_blocks):
        keys = index[cu_k[n] : cu_k[n + 1]]
        rows = range(int(cu_q[n]), int(cu_q[n + 1]))
        assert (rows.start, rows.stop) == (block.start, block.stop)
        offset = len(keys) - len(rows)  # causal from the bottom right
        seen = torch.tensor([[k <= q + offset for k in range(len(keys))] for q in range(len(rows))])
        assert torch.equal(seen, layout.mask(block, None))
        queries += len(rows)
    assert queries == len(layout.example)


numbers = st.fixed_dictionaries(
    {"desirable": st.sampled_from([0.0, 1.0])},
    optional={"weight": st.floats(0, 9), "margin": st.floats(-9, 9)},
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes.flatmap(lambda shapes: st.tuples(st.just(shapes), *(numbers for _ in shapes))), st.integers(1, 300)
)
def test_values_follow_their_examples_into_every_micro_batch_with_defaults_for_what_they_lack(drawn, budget):
    shapes, *values = drawn
    rng = np.random.default_rng(0)
    items = [
        replace(random_branches(rng, prefix, rests), values=own)
        for (prefix, rests), own in zip(shapes, values, strict=True)
    ]
    names = {name for own in values for name in own}
    for batch in pack(items, budget):
        assert set(batch.values) == names, "the same in every micro-batch"
        for name, found in batch.values.items():
            assert found.dtype == torch.float64
            default = {"weight": 1.0, "margin": 0.0}.get(name)
            assert found.tolist() == [values[n].get(name, default) for n in batch.examples]


def test_values_move_with_their_micro_batch_and_none_is_made_up():
    item = random_branches(np.random.default_rng(0), 3, (2, 2))
    assert collate([item], [0]).values == {}
    moved = collate([replace(item, values={"weight": 0.1})], [0]).to(torch.device("meta"))
    assert {name: value.device.type for name, value in moved.values.items()} == {"weight": "meta"}


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_meets_every_example_once_in_an_order_of_its_own(examples: int, per_step: int, seed: int):
    sampler = StepSampler(examples, per_step, seed)
    steps = examples * 2  # at least two epochs
    met = [n for step in range(steps) for n in sampler.step(step)]
    for epoch in range(2):
        assert sorted(met[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert sampler.step(3) == StepSampler(examples, per_step, seed).step(3)


def test_steps_round_up_to_whole_ones():
    assert StepSampler(100, 16, 0).steps(1) == 7
    assert StepSampler(100, 16, 0).steps(0.5) == 4
    assert StepSampler(3, 16, 0).steps(1) == 1
