"""A micro-batch through the base in a role → the log-probs of its scored tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.errors import ModelError
from lora_dpo.logprobs.divergence import DivergenceHead
from lora_dpo.logprobs.head import FrozenHead, Head, head_is_frozen, head_tile, trainable_head, vocabulary
from lora_dpo.logprobs.transform import LogitTransform
from lora_dpo.model import Model, as_policy, as_reference
from lora_dpo.ways import scored_hidden

ROWS_AT_A_TIME = 128
"""Rows of whole distributions that are on the device together: 64 MB of float32 for 128k tokens."""


def token_logprobs(model: Model, batch: MicroBatch, *, tile: tuple[int, int] | None = None) -> Tensor:
    """log π(target) of each score row, float32 (float64 for a float64 model) [S], differentiable by the
    adapters.

    The role is the caller's: adapters on, or inside `as_reference`. The batch lies on the model's device.
    tile: how many (score rows, tokens of the vocabulary) there are logits of at a time; by itself it suits
    the device.
    """
    return _through_head(model, batch, tile, squares=False)[0]


def token_logprobs_and_square_sums(model: Model, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and log Σ_v π(v)² of each score row [S], without gradient."""
    logprobs, square_sums = _through_head(model, batch, None, squares=True)
    assert square_sums is not None
    return logprobs, square_sums


def _through_head(
    model: Model, batch: MicroBatch, tile: tuple[int, int] | None, squares: bool
) -> tuple[Tensor, Tensor | None]:
    with model.autocast():
        with model.saving():
            hidden = scored_hidden(model.causal, batch, model.way)
        return _of_hidden(model, hidden, batch.targets, tile, squares)


def _of_hidden(
    model: Model, hidden: Tensor, targets: Tensor, tile: tuple[int, int] | None, squares: bool
) -> tuple[Tensor, Tensor | None]:
    head = _head(model, tile)
    if head_is_frozen(model):
        made: Any = FrozenHead.apply(hidden.to(head.weight.dtype), targets, head, squares)
        return made
    rows = max(1, head.rows * head.columns // vocabulary(model))
    return trainable_head(model, hidden, targets, head.transform, rows, squares)


def token_logprobs_and_distributions(model: Model, batch: MicroBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` [S], and log π(·) at some score rows, `rows` int64 [R]: float32 [R, V], on the CPU.

    Without gradient.
    """
    transform = LogitTransform.of(model.causal.config)
    with torch.no_grad(), model.autocast():
        hidden = scored_hidden(model.causal, batch, model.way)
        logprobs, _ = _of_hidden(model, hidden, batch.targets, None, squares=False)
        whole = torch.empty(len(rows), vocabulary(model))
        for part in torch.arange(len(rows)).split(ROWS_AT_A_TIME):
            logits = model.head(hidden[rows[part].to(hidden.device)])
            whole[part] = torch.log_softmax(transform(logits.float()), dim=-1).cpu()
    return logprobs, whole


def token_divergence(
    model: Model, batch: MicroBatch, *, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each score row the policy's log-prob and KL(reference ‖ policy) in nats, differentiable by the
    adapters; the reference's log-prob and log Σ_v π(v)², without gradient. [S] each.

    Both roles run here, whatever role the model is in. Raises ModelError where the head learns: two heads
    would be needed.
    """
    if not head_is_frozen(model):
        raise ModelError(
            "this objective compares the whole distributions of policy and reference, which needs a head that"
            " both share: leave the head out of the adapter's targets, or take another objective, such as DPO"
        )
    with model.autocast():
        with as_reference(model):
            reference = scored_hidden(model.causal, batch, model.way)
        with as_policy(model), model.saving():
            hidden = scored_hidden(model.causal, batch, model.way)
        head = _head(model, tile)
        both = (x.to(head.weight.dtype) for x in (hidden, reference))
        made: Any = DivergenceHead.apply(*both, batch.targets, head)
        return made


def _head(model: Model, tile: tuple[int, int] | None) -> Head:
    rows, columns = head_tile(model.device) if tile is None else tile
    bias = getattr(model.head, "bias", None)
    return Head(model.head.weight, bias, LogitTransform.of(model.causal.config), rows, columns)
