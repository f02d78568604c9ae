"""Reward models: their objective, where on a conversation they are read, and that transformers reads a saved
adapter as the same reward model. Runs are in test_reward_runs.py, roles in test_reward_roles.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    random_branches,
    small_tokenizer,
    with_random_adapter,
)
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from lora_dpo.batching import collate
from lora_dpo.errors import RecipeError
from lora_dpo.logprobs.rewards import at_ends
from lora_dpo.losses import LDDPO, BradleyTerry, ChosenSFT, LogProbs, Sum, weighted
from lora_dpo.model import load_model, save_adapter
from lora_dpo.model.base import never_repack
from lora_dpo.recipe import Adapter, Base
from lora_dpo.reward import RewardModel
from lora_dpo.tokenization import Branches, ChatTokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]

ASK = ({"role": "user", "content": "the cat sat"},)


def given(rewards: list[list[float]], **values: list[float]) -> LogProbs:
    columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()}
    policy = torch.tensor(rewards, dtype=torch.float64)
    return LogProbs(policy, None, torch.ones(policy.shape, dtype=torch.int64), columns)


def softplus(x: float) -> float:
    """−log σ(−x)."""
    return math.log1p(math.exp(x))


# The objective


def test_the_loss_is_that_of_the_difference_of_rewards():
    loss = BradleyTerry()(given([[1.5, 0.5], [-2.0, 1.0]]))
    assert loss.per_example.tolist() == pytest.approx([softplus(-1.0), softplus(3.0)], rel=1e-14)
    assert loss.metrics["rewards/margin"].tolist() == [1.0, -3.0]
    assert loss.metrics["rewards/accuracy"].tolist() == [1.0, 0.0]
    assert loss.metrics["rewards/chosen"].tolist() == [1.5, -2.0]
    assert not [name for name in loss.metrics if name.startswith("logps")]


def test_the_margin_of_a_row_must_be_exceeded_as_far_as_offset_says():
    rows = given([[1.5, 0.5], [1.5, 0.5]], margin=[0.0, 2.0])
    loss = BradleyTerry(offset=0.5)(rows).per_example
    assert loss.tolist() == pytest.approx([softplus(-1.0), softplus(0.0)], rel=1e-14)
    assert BradleyTerry()(rows).per_example.tolist() == pytest.approx([softplus(-1.0)] * 2, rel=1e-14)


def test_centering_adds_the_square_of_the_sum_and_smoothing_takes_its_share():
    rows = given([[1.5, 0.5], [-2.0, 1.0]])
    centered = BradleyTerry(centering=0.01)(rows).per_example
    assert centered.tolist() == pytest.approx([softplus(-1.0) + 0.04, softplus(3.0) + 0.01], rel=1e-13)
    smooth = BradleyTerry(label_smoothing=0.2)(rows).per_example
    expected = [0.8 * softplus(-1.0) + 0.2 * softplus(1.0), 0.8 * softplus(3.0) + 0.2 * softplus(-3.0)]
    assert smooth.tolist() == pytest.approx(expected, rel=1e-13)


def test_a_rows_weight_counts():
    rows = given([[1.5, 0.5], [-2.0, 1.0]], weight=[0.0, 2.0])
    assert weighted(BradleyTerry()(rows), rows).tolist() == pytest.approx([0.0, 2 * softplus(3.0)], rel=1e-13)


def test_rewards_and_log_probs_are_not_mixed_in_one_objective():
    with pytest.raises(RecipeError, match=r"score head and others at log-probs"):
        Sum((BradleyTerry(), ChosenSFT()), (1.0, 1.0))
    with pytest.raises(RecipeError, match=r"loss\.of got BradleyTerry"):
        LDDPO(of=BradleyTerry())
    both = Sum((BradleyTerry(), BradleyTerry(centering=1.0)), (1.0, 0.5))
    assert both.needs.rewards and not both.needs.reference


# Where it is read


def plain_place(ids: np.ndarray, pad: int | None) -> int:
    """The token that transformers pools, found token by token from the right."""
    for place in reversed(range(len(ids))):
        if pad is None or ids[place] != pad:
            return place
    return 0


@pytest.mark.parametrize("pad", [None, 0, 3])
def test_each_side_is_read_at_its_rightmost_token_that_is_no_padding(pad: int | None):
    """Four tokens only, so that ends, whole rests and whole conversations of padding occur; empty rests and
    prefixes too.
    """
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = [(int(rng.integers(0, 4)), [int(n) for n in rng.integers(0, 4, 3)]) for _ in range(3)]
        sizes = [(prefix or 1, rests) for prefix, rests in sizes]
        items = [random_branches(rng, prefix, rests, vocabulary=4) for prefix, rests in sizes]
        batch = collate(items, range(3))
        ends = at_ends(batch, pad)
        sequences = batch.layout.sequences
        found = iter(ends.score_positions.tolist())
        for n, item in enumerate(items):
            for side in range(3):
                expected = sequences[3 * n + side][plain_place(item.side(side), pad)]
                assert next(found) == expected
        assert ends.sequences.tolist() == list(range(9)) and ends.rows == (3, 3, 3)


def test_conversations_without_a_shared_prefix_are_read_at_their_own_ends():
    rng = np.random.default_rng(1)
    batch = collate([random_branches(rng, 0, (3, 2)), random_branches(rng, 0, (1, 4))], range(2))
    assert at_ends(batch, None).score_positions.tolist() == [2, 4, 5, 9]


# The same reward model elsewhere

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
}


def save_base(folder: Path, kind: str, **changes: Any) -> Path:
    tokenizer = small_tokenizer()
    values = {"num_hidden_layers": 2} if kind != "gpt2" else {}
    values |= SIZES[kind] | {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2} | changes
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_adapter(base: Base, folder: Path, seed: int = 1) -> Path:
    """A reward model's adapter with random values, score head too."""
    model = load_model(base, Adapter(rank=4), reference=None, rewards=True)
    save_adapter(with_random_adapter(model, seed=seed), folder)
    return folder


def by_transformers(base: str | Path, adapter: Path, **options: Any) -> PeftModel:
    network = AutoModelForSequenceClassification.from_pretrained(
        str(base), num_labels=1, dtype=torch.float32, **options
    )
    loaded = PeftModel.from_pretrained(network, str(adapter))
    # bitsandbytes would re-pack 4-bit weights for a kernel of other rounding, on some CPUs.
    never_repack(loaded)
    return loaded.eval()


def one_at_a_time(model: PeftModel, items: list[Branches]) -> list[list[float]]:
    def reward(item: Branches, side: int) -> float:
        ids = torch.from_numpy(item.side(side).astype(np.int64))
        with torch.no_grad():
            return model(input_ids=ids[None]).logits.item()

    return [[reward(item, side) for side in range(item.sides)] for item in items]


def in_one_batch(model: PeftModel, items: list[Branches], pad: int, left: bool) -> list[float]:
    sides = [item.side(side).tolist() for item in items for side in range(item.sides)]
    longest = max(map(len, sides))
    rows = [[pad] * (longest - len(s)) + s if left else s + [pad] * (longest - len(s)) for s in sides]
    seen = [[1] * len(s) for s in sides]
    mask = [[0] * (longest - len(m)) + m if left else m + [0] * (longest - len(m)) for m in seen]
    with torch.no_grad():
        output = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))
    return output.logits[:, 0].tolist()


def flat(rewards: list[list[float]]) -> list[float]:
    return [reward for row in rewards for reward in row]


def conversations(rewarder: RewardModel) -> list[Branches]:
    """Two, three and one response; one is another's beginning, and one empty."""
    return [
        rewarder.branches(ASK, ["the dog", "the dog ate"]),
        rewarder.branches(({"role": "user", "content": "red"},), ["", "in the sun", "hat"]),
        rewarder.branches(({"role": "user", "content": "the mat and the hat"},), ["no"]),
    ]


@pytest.mark.parametrize("kind", SIZES)
def test_transformers_gives_the_saved_adapter_the_same_rewards(kind: str, tmp_path: Path):
    """Packed here; there one conversation at a time, and in batches padded on either side."""
    base = Base(str(save_base(tmp_path / "base", kind)), quantization="none", compute_dtype="float32")
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    model = load_model(base)
    rewarder = RewardModel.put_on(model, adapter, ChatTokenizer(model.tokenizer))
    items = conversations(rewarder)
    assert [item.sides for item in items] == [2, 3, 1]
    found = rewarder.rewards(items)
    theirs = by_transformers(base.model, adapter)
    alone = one_at_a_time(theirs, items)
    assert flat(found) == pytest.approx(flat(alone), abs=1e-5)
    assert len({round(reward, 4) for reward in flat(found)}) == 6, "rewards that differ"
    for left in (False, True):
        # GPT-2 learns positions, which transformers counts from the padding on the left on.
        if not (left and kind == "gpt2"):
            assert flat(found) == pytest.approx(in_one_batch(theirs, items, 0, left), abs=1e-5)


@pytest.mark.parametrize("way", ["shared", "shared by mask", "packed", "packed by mask", "padded", "single"])
def test_every_way_of_running_gives_the_same_rewards(way: Any, tmp_path: Path, small_model: Path):
    base = Base(str(small_model), quantization="none", compute_dtype="float32")
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    model = load_model(base)
    expected = RewardModel.put_on(model, adapter, ChatTokenizer(model.tokenizer))
    other = load_model(base)
    other.verdict = replace(other.verdict, way=way)
    if way != "shared":
        other.causal.set_attn_implementation("sdpa")
    found = RewardModel.put_on(other, adapter, ChatTokenizer(other.tokenizer))
    items = conversations(expected)
    assert flat(found.rewards(items)) == pytest.approx(flat(expected.rewards(items)), abs=1e-5)


@pytest.mark.parametrize(("name", "ending"), [("pad is eos", 2), ("no pad", None)])
def test_it_is_read_where_transformers_reads_it_whatever_pads(name: str, ending: int | None, tmp_path: Path):
    """A pad token that also ends every turn is passed over; without one the last token counts."""
    folder = save_base(tmp_path / "base", "llama", pad_token_id=ending)
    base = Base(str(folder), quantization="none", compute_dtype="float32")
    adapter = save_reward_adapter(base, tmp_path / "adapter")
    model = load_model(base)
    rewarder = RewardModel.put_on(model, adapter, ChatTokenizer(model.tokenizer))
    turns = rewarder.branches(ASK, ["the dog", "the dog ate"])
    # As other templates end: with the end-of-turn itself.
    rests, scored = (tuple(part[:-1] for part in parts) for parts in (turns.rests, turns.scored))
    ended = replace(turns, rests=rests, scored=scored)
    assert all(rest[-1] == 2 for rest in ended.rests)
    items = [turns, ended]
    found = rewarder.rewards(items)
    theirs = one_at_a_time(by_transformers(folder, adapter), items)
    assert flat(found) == pytest.approx(flat(theirs), abs=1e-5)
