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

HEAD_BYTES = 256 * 2**20
"""What a chunk of logits in float32 may take."""


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


def token_logprobs(model: Model, batch: MicroBatch, *, head_bytes: int = HEAD_BYTES) -> Tensor:
    """log π(target) of each score row, float32 (float64 for a float64 model) [S], differentiable by the
    adapters.

    The role is the caller's: adapters on, or inside `as_reference`. The batch lies on the model's device.
    """
    with model.autocast():
        hidden = scored_hidden(model.causal, batch, model.way)
        transform = LogitTransform.of(model.causal.config)
        rows = max(1, head_bytes // (4 * vocabulary(model)))
        if head_is_frozen(model):
            weight, bias = model.head.weight, getattr(model.head, "bias", None)
            arguments = (hidden.to(weight.dtype), weight, bias, batch.targets, transform, rows)
            return _FrozenHead.apply(*arguments)  # pyright: ignore[reportReturnType]
        return _trainable_head(model, hidden, batch.targets, transform, rows)


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
        keep = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if keep else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = transform(torch.nn.functional.linear(hidden[part], weight, bias).to(wide))
            normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
            target = targets[part, None]
            logprobs[part] = (logits.gather(1, target) - normalizer)[:, 0]
            if slope is not None:
                # one-hot(target) − softmax, in place of the logits, times what the transform adds.
                derivative = transform.derivative(logits)
                by_logits = logits.sub_(normalizer).exp_().neg_()
                by_logits.scatter_add_(1, target, torch.ones_like(target, dtype=wide)).mul_(derivative)
                slope[part] = by_logits.to(weight.dtype) @ weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(slope.dtype), None, None, None, None, None


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
