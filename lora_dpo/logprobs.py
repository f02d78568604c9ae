"""A micro-batch through the base in a role → the log-probs of its scored tokens.

Legend: `T` packed tokens, `S` score rows, `V` vocabulary, `D` width.

Only score rows reach the LM head, in chunks; the full [T, V] logits never exist. The head is frozen, so the
gradient of a token's log-prob by its hidden state is finished in the forward pass and kept as one vector a
row: with logits z = c·W h, ∂ log p(t)/∂h = c·(W_t − Σ_v p_v W_v). Backward multiplies it with what comes in:
exact for every objective of token log-probs, and nothing is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_dpo.batching import MicroBatch
from lora_dpo.model import Model
from lora_dpo.ways import scored_hidden

HEAD_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
"""What a chunk of logits in float32 may take: on the CPU, what stays in its cache between two passes."""

HEAD_ROWS = 128
"""On the CPU a chunk has at least so many rows: with fewer, the head's weight is read more than it is
used.
"""


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


def token_logprobs(model: Model, batch: MicroBatch, *, head_bytes: int | None = None) -> Tensor:
    """log π(target) of each score row, float32 (float64 for a float64 model) [S], differentiable by the
    adapters.

    The role is the caller's: adapters on, or inside `as_reference`. The batch lies on the model's device.
    head_bytes: what a chunk of logits may take; by itself it suits the device.
    """
    with model.autocast():
        with model.saving():
            hidden = scored_hidden(model.causal, batch, model.way)
        transform = LogitTransform.of(model.causal.config)
        rows = chunk_rows(model) if head_bytes is None else max(1, head_bytes // (4 * vocabulary(model)))
        if head_is_frozen(model):
            weight, bias = model.head.weight, getattr(model.head, "bias", None)
            arguments = (hidden.to(weight.dtype), weight, bias, batch.targets, transform, rows)
            return _FrozenHead.apply(*arguments)  # pyright: ignore[reportReturnType]
        return _trainable_head(model, hidden, batch.targets, transform, rows)


def chunk_rows(model: Model) -> int:
    """How many score rows go through the head at a time."""
    rows = HEAD_BYTES.get(model.device.type, HEAD_BYTES["cuda"]) // (4 * vocabulary(model))
    return max(rows, HEAD_ROWS if model.device.type == "cpu" else 1)


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
    ) -> Tensor:
        """hidden [S, D]; weight [V, D]; targets int64 [S]; → float32 [S]."""
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=wide)
        # The same buffers for every chunk: fresh memory of this size is faulted in anew each time.
        shape = (min(rows, len(hidden)), len(weight))
        raw_buffer, wide_buffer = hidden.new_empty(shape), hidden.new_empty(shape, dtype=wide)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            raw = torch.mm(hidden[part], weight.t(), out=raw_buffer[: len(target)])
            logits = wide_buffer[: len(target)].copy_(raw)
            logits = transform(logits if bias is None else logits.add_(bias))
            derivative = transform.derivative(logits) if slope is not None else 1.0
            logprobs[part], total = _log_softmax_at(logits, target)
            if slope is not None:
                # one-hot(target) − softmax, in place of the exponentials, times what the transform adds.
                by_logits = logits.div_(-total).scatter_add_(1, target, torch.ones_like(total))
                if isinstance(derivative, Tensor) or derivative != 1.0:
                    by_logits.mul_(derivative)
                torch.mm(raw.copy_(by_logits), weight, out=slope[part])
        if slope is not None:
            ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(slope.dtype), None, None, None, None, None


def _log_softmax_at(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log-softmax at target int64 [S, 1] → [S], the sum of exponentials [S, 1]); logits [S, V] become
    exp(logits − their maximum), in place.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    at_target = logits.gather(1, target) - highest
    total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    return (at_target - total.log())[:, 0], total


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
