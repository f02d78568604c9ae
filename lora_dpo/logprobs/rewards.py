"""A micro-batch through the base and a score head → the reward of each side.

Legend: `T` packed tokens, `N` sequences (examples × sides), `D` width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.model import Model, score_weight
from lora_dpo.ways import scored_hidden


def sequence_rewards(model: Model, batch: MicroBatch) -> Tensor:
    """The reward of each side: float32 (float64 for a float64 model) [examples, sides], differentiable by
    adapter and head.

    The role is the caller's: the policy that is trained as a reward model, or inside `as_reward`. The batch
    lies on the model's device. Raises ModelError where no score head is on in that role.
    """
    weight = score_weight(model.causal)
    ends = at_ends(batch, model.causal.config.get_text_config().pad_token_id)
    with model.autocast(), model.saving():
        hidden = scored_hidden(model.causal, ends, model.way)
    with torch.autocast(model.device.type, enabled=False):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rewards = hidden.to(wide) @ weight.to(wide)[0]
    return rewards.view(len(batch.examples), batch.sides)


def at_ends(batch: MicroBatch, pad: int | None) -> MicroBatch:
    """The batch with one score row for each side, [N]: the hidden state of the token that transformers'
    sequence classification pools.

    That is the rightmost token of the whole conversation that is not `pad` (`pad_token_id` of the model's
    config, whatever the tokenizer pads with), the last one without a `pad`; a side's own rest may be empty,
    or all of it `pad`, and then it lies in the prefix. The first token, where all are `pad`.
    """
    layout, sides, device = batch.layout, batch.sides, batch.token_ids.device
    here = torch.arange(batch.tokens, device=device)
    counts = here
    if pad is not None:
        counts = torch.where((batch.token_ids != pad) | (batch.positions == 0), here, -1)
    # Of each example's prefix and rests the last place that counts, -1 for none.
    group = layout.example * (sides + 1) + layout.branch
    last = counts.new_full((len(batch.examples) * (sides + 1),), -1)
    last = last.scatter_reduce(0, group, counts, "amax").view(-1, sides + 1)
    places = torch.where(last[:, 1:] >= 0, last[:, 1:], last[:, :1]).flatten()
    return replace(
        batch,
        score_positions=places,
        targets=batch.token_ids[places],
        sequences=torch.arange(len(places), device=device),
        rows=(sides,) * len(batch.examples),
    )
