"""The ways of running a micro-batch through a model: from sharing prefixes to one sequence at a time.

Legend: `T` packed tokens, `S` score rows, `N` sequences, `L` the longest of them, `D` width.

Every way gives the hidden states of the same score rows, so that nothing downstream knows which one it was.
Which is right for an architecture is found out by `lora_dpo.probe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_dpo.attention import NAME as BRANCH_ATTENTION
from lora_dpo.batching import Block, BranchLayout, MicroBatch, Way


def own_attention(network: PreTrainedModel) -> str:
    """The attention that a model brings with it, as `set_attn_implementation` takes it."""
    return "sdpa" if network._supports_sdpa else "eager"


def use_attention(network: PreTrainedModel, way: Way) -> None:
    """Set the attention that a way relies on, unless it is set already: some models warn that they can't."""
    wanted = BRANCH_ATTENTION if way == "shared" else own_attention(network)
    if network.config._attn_implementation != wanted:
        network.set_attn_implementation(wanted)


def backbone(network: PreTrainedModel) -> torch.nn.Module:
    """What is under the head; Llama 4's `base_model` is the whole model."""
    found = network.base_model
    return network.model if found is network else found  # pyright: ignore[reportReturnType]


def has_experts(network: torch.nn.Module) -> bool:
    """Mixtures of experts group the tokens of all sequences by expert: another grouping rounds otherwise."""
    return any("experts" in name for name, _ in network.named_modules())


def scored_hidden(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    """The hidden states [S, D] that predict the scored tokens. The attention is the way's own already."""
    lengths = [prefix + rest for prefix, *rests in batch.layout.lengths for rest in rests]
    if _must_be_apart(network.config, lengths):
        return _one_by_one(network, batch, way)
    return _RUNS[way](network, batch, way)


def _call(network: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    """ids int64 [rows, tokens] → last hidden states [rows, tokens, D]."""
    return backbone(network)(input_ids=ids, use_cache=False, **arguments).last_hidden_state


def _shared(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    ids, positions = batch.token_ids[None], batch.positions[None]
    if way == "shared":
        hidden = _call(network, ids, position_ids=positions, branch_layout=batch.layout)
    else:
        everything = Block(0, batch.tokens, ((0, batch.tokens),), causal=False)
        mask = _additive(batch.layout.mask(everything, None), network.dtype)
        hidden = _call(network, ids, position_ids=positions, attention_mask=mask)
    return hidden[0][batch.score_positions]


def _packed(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    sequences = batch.layout.sequences
    index = torch.cat(sequences)
    positions = batch.positions[index]
    arguments = {"position_ids": positions[None]}
    if way == "packed by mask":
        of = torch.cat([torch.full_like(places, n) for n, places in enumerate(sequences)])
        seen = (of[:, None] == of[None]) & (positions[:, None] >= positions[None])
        arguments["attention_mask"] = _additive(seen, network.dtype)
    hidden = _call(network, batch.token_ids[index][None], **arguments)[0]
    return hidden[_in_a_row(batch)]


def _padded(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    rows = [batch.token_ids[places] for places in batch.layout.sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    hidden = _call(network, ids, attention_mask=mask.long())
    return hidden[batch.sequences, batch.positions[batch.score_positions]]


def _one_by_one(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    hidden = []
    for places in batch.layout.sequences:
        arguments = {}
        if way == "shared":  # its attention takes nothing without a layout
            arguments = {"branch_layout": _alone(batch.positions[places])}
        hidden.append(_call(network, batch.token_ids[places][None], **arguments)[0])
    return torch.cat(hidden)[_in_a_row(batch)]


def _alone(positions: Tensor) -> BranchLayout:
    example, branch = torch.zeros_like(positions), torch.ones_like(positions)
    return BranchLayout(example, branch, positions, [(0, len(positions))])


def _in_a_row(batch: MicroBatch) -> Tensor:
    """Where the score rows lie when the sequences follow one another, each whole: int64 [S]."""
    lengths = torch.tensor([0, *(len(places) for places in batch.layout.sequences)])
    starts = lengths.cumsum(0).to(batch.sequences.device)
    return starts[batch.sequences] + batch.positions[batch.score_positions]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [T, T] → [1, 1, T, T] to add to logits: eager attention takes no bool mask."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


_RUNS: dict[Way, Callable[[PreTrainedModel, MicroBatch, Way], Tensor]] = {
    "shared": _shared,
    "shared by mask": _shared,
    "packed": _packed,
    "packed by mask": _packed,
    "padded": _padded,
    "single": _one_by_one,
}


def _must_be_apart(config: Any, lengths: Sequence[int]) -> bool:
    """Whether in company another sequence's length would choose a sequence's rotary frequencies."""
    for limit, kinds in switching_lengths(config):
        longer = [length > limit for length in lengths]
        if len(lengths) > 1 and any(longer) and (kinds > 2 or not all(longer)):
            return True
    return False


def switching_lengths(config: Any) -> list[tuple[int, float]]:
    """(up to how many tokens rotary frequencies stay the same, how many sets of them there are).

    The longest position of a forward call decides: LongRoPE has two sets, dynamic NTK scaling one for each
    length.
    """
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = ropes.values() if all(isinstance(r, dict) for r in ropes.values()) else [ropes]
    name, most, found = "original_max_position_embeddings", getattr(text, "max_position_embeddings", 1), []
    for rope in ropes:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "longrope":
            found.append((rope.get(name) or getattr(text, name, None) or most, 2))
        elif "dynamic" in kind:
            found.append((most, math.inf))
    return found
