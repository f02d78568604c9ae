"""KL(reference ‖ policy) at every scored token, with its gradient, by the same tiles as log-probs.

Legend: `S` score rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_dpo.logprobs.head import Head, OnlineSoftmax, room, wide


class DivergenceHead(torch.autograd.Function):
    """Log-probs of policy and reference, and the divergence between their distributions, row by row.

    With logits z of the policy and y of the reference, distributions p and r: KL = Σ_v r_v (y_v − z_v) −
    log Σ e^y + log Σ e^z, and ∂KL/∂h = c·Σ_v (p_v − r_v) W_v.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, reference: Tensor, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, reference [S, D]: hidden states in both roles; targets int64 [S]. Returns the policy's
        log-probs, the divergence in nats, and without gradient the reference's log-probs and the policy's
        log Σ_v p_v², float32 [S] each.
        """
        of_logprob, of_divergence = torch.empty_like(hidden), torch.empty_like(hidden)
        logprobs = hidden.new_empty(len(hidden), dtype=wide(hidden))
        divergence, theirs, squares = (torch.empty_like(logprobs) for _ in range(3))
        for start in range(0, len(hidden), head.rows):
            rows = slice(start, start + head.rows)
            slopes = of_logprob[rows], of_divergence[rows]
            found = _rows(hidden[rows], reference[rows], targets[rows, None], head, slopes)
            logprobs[rows], divergence[rows], theirs[rows], squares[rows] = (x[:, 0] for x in found)
        ctx.save_for_backward(of_logprob, of_divergence)
        ctx.mark_non_differentiable(theirs, squares)
        return logprobs, divergence, theirs, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_logprob, of_divergence = ctx.saved_tensors
        by_hidden = of_logprob * grads[0][:, None] + of_divergence * grads[1][:, None]
        return by_hidden.to(of_logprob.dtype), None, None, None


def _rows(
    hidden: Tensor, reference: Tensor, target: Tensor, head: Head, slopes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns of a tile's rows, [R, 1] each; slopes are filled, [R, D] each."""
    mine = OnlineSoftmax(hidden, target, weighted=True, squares=True)
    theirs = OnlineSoftmax(reference, target, weighted=True)
    buffers, other_buffers = head.buffers(hidden), head.buffers(reference)
    apart = torch.zeros_like(mine.highest)
    for first, part in head.parts():
        z = head.logits(hidden, first, part, buffers)
        y = head.logits(reference, first, part, other_buffers)
        derivative, difference = head.transform.derivative(z), y - z
        raw = room(buffers[0], *z.shape)
        exponentials, shrink = mine.add(z, first)
        mine.weigh(exponentials * derivative, shrink, part, raw)
        exponentials, shrink = theirs.add(y, first)
        apart = apart * shrink + (exponentials * difference).sum(dim=-1, keepdim=True)
        theirs.weigh(exponentials * derivative, shrink, part, raw)
    own = head.weight[target[:, 0]] * head.transform.derivative(mine.at_target)
    p, r = (softmax.target_exponential / softmax.total for softmax in (mine, theirs))
    assert mine.weighted is not None and theirs.weighted is not None
    p_others, r_others = mine.weighted / mine.total, theirs.weighted / theirs.total
    slopes[0].copy_(own * (mine.others / mine.total) - p_others)
    slopes[1].copy_(p_others - r_others + (p - r) * own)
    apart = apart + theirs.target_exponential * (theirs.at_target - mine.at_target)
    constant = mine.highest + mine.total.log() - theirs.highest - theirs.total.log()
    return mine.logprob(), apart / theirs.total + constant, theirs.logprob(), mine.square_sum()
