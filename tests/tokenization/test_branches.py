"""Sharing is bookkeeping: it never changes a side or what is scored in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_dpo.preferences import Where
from lora_dpo.tokenization import share

HERE = Where("pairs.jsonl", 7)
SIDE = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8)


@given(st.lists(SIDE, min_size=1, max_size=4))
def test_sides_come_back_and_the_prefix_is_the_longest(sides):
    ids = [[token for token, _ in side] for side in sides]
    masks = [[scored and place > 0 for place, (_, scored) in enumerate(side)] for side in sides]
    branches = share(ids, [[scored for _, scored in side] for side in sides], HERE)
    assert [branches.side(i).tolist() for i in range(branches.sides)] == ids
    assert [mask.tolist() for mask in branches.scored] == masks
    common = len(branches.prefix)
    together = [list(zip(*side, strict=True)) for side in zip(ids, masks, strict=True)]
    assert all(side[:common] == together[0][:common] for side in together)
    nexts = {side[common] if len(side) > common else None for side in together}
    assert len(sides) == 1 or len(nexts) > 1 or nexts == {None}


def test_counts_and_types_by_hand():
    branches = share([[5, 6, 7, 8], [5, 6, 9]], [[0, 0, 1, 1], [0, 0, 1]], HERE)
    assert branches.prefix.tolist() == [5, 6]
    assert [rest.tolist() for rest in branches.rests] == [[7, 8], [9]]
    assert (branches.sides, branches.tokens) == (2, 5)
    assert [branches.scored_count(i) for i in range(2)] == [2, 1]
    assert branches.where == HERE
    assert branches.prefix.dtype == branches.side(0).dtype == np.int32
    assert branches.scored[0].dtype == np.bool_


def test_a_side_that_is_the_start_of_the_other_has_an_empty_rest():
    branches = share([[1, 2, 3], [1, 2]], [[0, 1, 1], [0, 1]], HERE)
    assert [len(rest) for rest in branches.rests] == [1, 0]


def test_the_prefix_ends_where_masks_differ():
    branches = share([[1, 2, 3], [1, 2, 3]], [[0, 0, 1], [0, 1, 1]], HERE)
    assert branches.prefix.tolist() == [1]
    assert [branches.scored_count(i) for i in range(2)] == [1, 2]


@pytest.mark.parametrize("sides, masks", [([], []), ([[]], [[]]), ([[1, 2]], [[0]])])
def test_impossible_sides_are_refused(sides, masks):
    with pytest.raises(ValueError, match=r"pairs\.jsonl row 7"):
        share(sides, masks, HERE)
