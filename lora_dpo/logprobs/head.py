"""Rows of hidden states through the LM head, by tiles of rows and tokens.

Legend: `S` score rows, `V` vocabulary, `D` width, `R` rows of a tile.

The head is frozen, so the gradient of a token's log-prob by its hidden state is finished in the forward pass
and kept as one vector a row: with logits z = c·W h, ∂ log p(t)/∂h = c·(W_t − Σ_v p_v W_v). Backward
multiplies it with what comes in: exact for every objective of token log-probs, and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_dpo.logprobs.transform import LogitTransform
from lora_dpo.model import Model

HEAD_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
"""What the logits held at a time may take in float32: on the CPU, what stays in its cache between passes."""

TILE_ROWS = {"cuda": 4096, "cpu": 512}
"""How many score rows go through the head together: the head's weight is read once for them."""


def head_tile(device: torch.device) -> tuple[int, int]:
    """(score rows, tokens of the vocabulary) whose logits are held at a time."""
    kind = device.type if device.type in HEAD_BYTES else "cuda"
    return TILE_ROWS[kind], HEAD_BYTES[kind] // (4 * TILE_ROWS[kind])


@dataclass(frozen=True)
class Head:
    """A frozen LM head, and by how many rows and tokens at a time it is gone through.

    weight [V, D], bias [V] or None.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    rows: int
    columns: int

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first token, weight of the next `columns` tokens)"""
        for first in range(0, len(self.weight), self.columns):
            yield first, self.weight[first : first + self.columns]

    def buffers(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Room for a tile's logits, as the product gives them and in float32; the same for every tile, since
        fresh memory of this size is faulted in anew each time.
        """
        size = min(self.rows, len(hidden)) * min(self.columns, len(self.weight))
        return hidden.new_empty(size), hidden.new_empty(size, dtype=wide(hidden))

    def logits(self, hidden: Tensor, first: int, part: Tensor, buffers: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of rows [R] for one part, float32 [R, its tokens], in the second buffer where it can."""
        raw, logits = (room(buffer, len(hidden), len(part)) for buffer in buffers)
        torch.mm(hidden, part.t(), out=raw)
        logits = logits.copy_(raw)
        return self.transform(
            logits if self.bias is None else logits.add_(self.bias[first : first + len(part)])
        )


def room(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def vocabulary(model: Model) -> int:
    return model.head.weight.shape[0]


def head_is_frozen(model: Model) -> bool:
    """A plain matrix without gradients. A head with an adapter, or one that is trained, is not."""
    return type(model.head) is torch.nn.Linear and not any(p.requires_grad for p in model.head.parameters())


class OnlineSoftmax:
    """The softmax of a tile's rows [R], met a part of the vocabulary at a time.

    Sums are over exp(logit − highest so far), as by Milakov & Gimelshein (2018, arXiv:1805.02867, algorithm
    3). The target is left out of them: what a nearly certain token lacks to 1 keeps its digits.
    """

    def __init__(self, hidden: Tensor, target: Tensor, *, weighted: bool = False, squares: bool = False):
        """hidden [R, D]; target int64 [R, 1]. weighted: sum the head's weight by probability, [R, D].
        squares: sum squared probabilities.
        """
        dtype = wide(hidden)
        self.target = target
        self.highest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=dtype)
        self.at_target, self.others = torch.zeros_like(self.highest), torch.zeros_like(self.highest)
        self.squares = torch.zeros_like(self.highest) if squares else None
        self.weighted = hidden.new_zeros(hidden.shape, dtype=dtype) if weighted else None

    def add(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Meet the logits [R, C] of tokens from `first` on. In their place come back the exponentials, 0 at
        the target; and how much what was summed before has shrunk, [R, 1].
        """
        column = (self.target - first).clamp(0, logits.shape[1] - 1)
        here = (self.target >= first) & (self.target < first + logits.shape[1])
        self.at_target = torch.where(here, logits.gather(1, column), self.at_target)
        risen = torch.maximum(self.highest, logits.amax(dim=-1, keepdim=True))
        shrink = (self.highest - risen).exp()
        self.highest = risen
        exponentials = logits.sub_(risen).exp_()
        exponentials.scatter_(1, column, exponentials.gather(1, column).masked_fill_(here, 0.0))
        self.others = self.others * shrink + exponentials.sum(dim=-1, keepdim=True)
        if self.squares is not None:
            self.squares = self.squares * shrink**2 + exponentials.square().sum(dim=-1, keepdim=True)
        return exponentials, shrink

    def weigh(self, factors: Tensor, shrink: Tensor, part: Tensor, raw: Tensor) -> None:
        """Add factors [R, C] times the head's part [C, D] to `weighted`. raw: room in the head's dtype."""
        if self.weighted is not None:
            self.weighted.mul_(shrink).add_(raw.copy_(factors) @ part)

    @property
    def target_exponential(self) -> Tensor:
        return (self.at_target - self.highest).exp()

    @property
    def total(self) -> Tensor:
        return self.others + self.target_exponential

    def logprob(self) -> Tensor:
        """log p(target), [R, 1]."""
        return self.at_target - self.highest - self.total.log()

    def square_sum(self) -> Tensor:
        """log Σ_v p_v², [R, 1]."""
        assert self.squares is not None
        return (self.squares + self.target_exponential**2).log() - 2 * self.total.log()


class FrozenHead(torch.autograd.Function):
    """Log-probs of rows through a frozen head, with the gradient by the hidden states made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, squares: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [S, D]; targets int64 [S]. Returns log p(target), float32 [S], and with `squares` log Σ_v
        p_v², float32 [S], without gradient.
        """
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logprobs = hidden.new_empty(len(hidden), dtype=wide(hidden))
        square_sums = torch.empty_like(logprobs) if squares else None
        buffers = head.buffers(hidden)
        for start in range(0, len(hidden), head.rows):
            rows = slice(start, start + head.rows)
            softmax = OnlineSoftmax(
                hidden[rows], targets[rows, None], weighted=slope is not None, squares=squares
            )
            for first, part in head.parts():
                logits = head.logits(hidden[rows], first, part, buffers)
                derivative = head.transform.derivative(logits) if slope is not None else 1.0
                exponentials, shrink = softmax.add(logits, first)
                if slope is not None:
                    raw = room(buffers[0], *exponentials.shape)
                    softmax.weigh(_times(exponentials, derivative), shrink, part, raw)
            logprobs[rows] = softmax.logprob()[:, 0]
            if square_sums is not None:
                square_sums[rows] = softmax.square_sum()[:, 0]
            if slope is not None and softmax.weighted is not None:
                # Σ_v p_v (W_t − W_v), each with what the transform adds; v = t cancels.
                own = softmax.others / softmax.total * head.transform.derivative(softmax.at_target)
                own = head.weight[targets[rows]] * own
                torch.sub(own, softmax.weighted.div_(softmax.total), out=slope[rows])
        ctx.save_for_backward(slope)
        ctx.set_materialize_grads(False)
        if square_sums is not None:
            ctx.mark_non_differentiable(square_sums)
        return logprobs, square_sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        by_hidden = None if grads[0] is None else (slope * grads[0][:, None]).to(slope.dtype)
        return by_hidden, None, None, None


def _times(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """In place, and not at all for 1."""
    return tensor if not isinstance(factor, Tensor) and factor == 1.0 else tensor.mul_(factor)


def trainable_head(
    model: Model, hidden: Tensor, targets: Tensor, transform: LogitTransform, rows: int, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """The plain way, for a head that learns: each chunk's logits are recomputed in the backward pass."""

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(hidden)
        logits = torch.log_softmax(transform(logits.to(wide(logits))), dim=-1)
        square_sum = (
            torch.logsumexp(2 * logits.detach(), dim=-1) if squares else logits.new_zeros(len(logits))
        )
        return logits.gather(1, targets[:, None])[:, 0], square_sum

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    made: list[Any] = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts]
    logprobs, square_sums = (torch.cat(column) for column in zip(*made, strict=True))
    return logprobs, square_sums if squares else None
