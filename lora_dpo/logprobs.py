"""A micro-batch through the base in a role → the log-probs of its scored tokens.

Legend: `T` packed tokens, `S` score rows, `V` vocabulary, `D` width.

Only score rows reach the LM head, and logits exist by tiles of rows and tokens: what they take depends
neither on [S] nor on [V]. The head is frozen, so the gradient of a token's log-prob by its hidden state is
finished in the forward pass and kept as one vector a row: with logits z = c·W h, ∂ log p(t)/∂h = c·(W_t −
Σ_v p_v W_v). Backward multiplies it with what comes in: exact for every objective of token log-probs, and
nothing is recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_dpo.batching import MicroBatch
from lora_dpo.model import Model
from lora_dpo.ways import scored_hidden

HEAD_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
"""What the logits held at a time may take in float32: on the CPU, what stays in its cache between passes."""

TILE_ROWS = {"cuda": 4096, "cpu": 512}
"""How many score rows go through the head together: the head's weight is read once for them."""


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to the head's output: logits = softcap(scale · W h)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """From a transformers config: Granite divides, Cohere and Falcon-H1 multiply, Gemma 2 caps."""
        text = config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0)
        scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
        scale /= float(getattr(text, "logits_scaling", None) or 1.0)
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        caps = (getattr(text, name, None) for name in names)
        return cls(scale, next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """d transformed / d logits, from the transformed ones."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap) ** 2)


def token_logprobs(model: Model, batch: MicroBatch, *, tile: tuple[int, int] | None = None) -> Tensor:
    """log π(target) of each score row, float32 (float64 for a float64 model) [S], differentiable by the
    adapters.

    The role is the caller's: adapters on, or inside `as_reference`. The batch lies on the model's device.
    tile: how many (score rows, tokens of the vocabulary) there are logits of at a time; by itself it suits
    the device.
    """
    with model.autocast():
        with model.saving():
            hidden = scored_hidden(model.causal, batch, model.way)
        transform = LogitTransform.of(model.causal.config)
        rows, columns = head_tile(model.device) if tile is None else tile
        if head_is_frozen(model):
            weight, bias = model.head.weight, getattr(model.head, "bias", None)
            arguments = (hidden.to(weight.dtype), weight, bias, batch.targets, transform, rows, columns)
            return _FrozenHead.apply(*arguments)  # pyright: ignore[reportReturnType]
        rows = max(1, rows * columns // vocabulary(model))
        return _trainable_head(model, hidden, batch.targets, transform, rows)


def head_tile(device: torch.device) -> tuple[int, int]:
    """(score rows, tokens of the vocabulary) whose logits are held at a time."""
    kind = device.type if device.type in HEAD_BYTES else "cuda"
    return TILE_ROWS[kind], HEAD_BYTES[kind] // (4 * TILE_ROWS[kind])


def vocabulary(model: Model) -> int:
    return model.head.weight.shape[0]


def head_is_frozen(model: Model) -> bool:
    """A plain matrix without gradients. A head with an adapter, or one that is trained, is not."""
    return type(model.head) is torch.nn.Linear and not any(p.requires_grad for p in model.head.parameters())


class _FrozenHead(torch.autograd.Function):
    """Log-probs of rows through a frozen head, with the gradient by the hidden states made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        rows: int,
        columns: int,
    ) -> Tensor:
        """hidden [S, D]; weight [V, D]; targets int64 [S]; → float32 [S]."""
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        # The same buffers for every tile: fresh memory of this size is faulted in anew each time.
        size = min(rows, len(hidden)) * min(columns, len(weight))
        buffers = hidden.new_empty(size), logprobs.new_empty(size)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            by_hidden = None if slope is None else slope[part]
            head = (weight, bias, transform, columns)
            logprobs[part] = _rows_through_head(hidden[part], targets[part, None], *head, buffers, by_hidden)
        if slope is not None:
            ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(slope.dtype), None, None, None, None, None, None


def _rows_through_head(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    columns: int,
    buffers: tuple[Tensor, Tensor],
    slope: Tensor | None,
) -> Tensor:
    """Log-probs of a tile's rows [R] by one pass over the vocabulary, and into `slope` [R, D] their gradient.

    hidden [R, D]; target int64 [R, 1]; buffers hold `columns` logits a row. The softmax is made online, as by
    Milakov & Gimelshein (2018, arXiv:1805.02867, algorithm 3): sums are over exp(logit − highest so far).
    The target is left out of them, so that what a token that is nearly certain lacks to 1 keeps its digits.
    """
    raw_buffer, wide_buffer = buffers
    highest = wide_buffer.new_full((len(hidden), 1), -torch.inf)
    at_target, others = torch.zeros_like(highest), torch.zeros_like(highest)
    weighted = None if slope is None else wide_buffer.new_zeros(hidden.shape)
    for first in range(0, len(weight), columns):
        head = weight[first : first + columns]
        shape = (len(hidden), len(head))
        raw, logits = (buffer[: math.prod(shape)].view(shape) for buffer in (raw_buffer, wide_buffer))
        torch.mm(hidden, head.t(), out=raw)
        logits = logits.copy_(raw)
        logits = transform(logits if bias is None else logits.add_(bias[first : first + columns]))
        derivative = transform.derivative(logits) if slope is not None else 1.0
        column = (target - first).clamp(0, len(head) - 1)
        here = (target >= first) & (target < first + len(head))
        at_target = torch.where(here, logits.gather(1, column), at_target)
        risen = torch.maximum(highest, logits.amax(dim=-1, keepdim=True))
        shrink = (highest - risen).exp()
        highest = risen
        exponentials = logits.sub_(highest).exp_()
        exponentials.scatter_(1, column, exponentials.gather(1, column).masked_fill_(here, 0.0))
        others = others * shrink + exponentials.sum(dim=-1, keepdim=True)
        if weighted is not None:
            if isinstance(derivative, Tensor) or derivative != 1.0:
                exponentials.mul_(derivative)
            weighted.mul_(shrink).add_(raw.copy_(exponentials) @ head)
    total = others + (at_target - highest).exp()
    if slope is not None and weighted is not None:
        # Σ_v p_v (W_t − W_v), each with what the transform adds; v = t cancels.
        own = weight[target[:, 0]] * (others / total * transform.derivative(at_target))
        torch.sub(own, weighted.div_(total), out=slope)
    return (at_target - highest - total.log())[:, 0]


def _trainable_head(
    model: Model, hidden: Tensor, targets: Tensor, transform: LogitTransform, rows: int
) -> Tensor:
    """The plain way, for a head that learns: each chunk's logits are recomputed in the backward pass."""

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.head(hidden)
        logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts])  # pyright: ignore[reportArgumentType,reportCallIssue]
