"""From logits and noise to tokens: temperature, then top-p, then the inverse of the cumulated distribution.

Legend: `N` rows, `V` vocabulary, `C` columns of the two-level sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS = 256
"""Probabilities are summed by so many at first: the row of sums, then one of its parts, is searched."""

FIRST = 512
"""Top-p looks among so many of the likeliest tokens first: sorting a whole vocabulary takes far longer."""

TINY = 1e-30
"""Temperatures below it would be 0 in float32, and are as greedy as this one."""

NOT_A_NUMBER = -1
"""The "token" of a row whose logits are no numbers."""


@dataclass(frozen=True)
class Chooser:
    """temperature, top_p: as in `Sampling`. vocabulary: ids from this one on, rows of the head that belong to
    no token, are never drawn; None draws all. never: other ids that are not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    vocabulary: int | None = None
    never: tuple[int, ...] = ()

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """int64 [N]: tokens drawn from logits [N, V] with numbers float64 [N] in [0, 1).

        The token is the first one at which the cumulated probability, in the order of the ids, exceeds the
        number; `NOT_A_NUMBER` where a row has a NaN, an infinity or nothing to draw from.
        """
        weights = self.weights(logits)
        tokens = inverse(weights, uniform)
        good = torch.isfinite(weights.sum(dim=-1)) & (weights.amax(dim=-1) > 0)
        return torch.where(good, tokens, NOT_A_NUMBER)

    def weights(self, logits: Tensor) -> Tensor:
        """float32 (float64 of float64 logits) [N, V]: what each token's probability is proportional to."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide = self._allowed(wide)
        # The likeliest one is exp(0), so nothing overflows however low the temperature.
        weights = ((wide - wide.amax(dim=-1, keepdim=True)) / max(self.temperature, TINY)).exp()
        return weights if self.top_p >= 1 else weights * nucleus(weights, self.top_p)

    def _allowed(self, logits: Tensor) -> Tensor:
        known = logits.shape[-1] if self.vocabulary is None else self.vocabulary
        never = [token for token in self.never if token < logits.shape[-1]]
        if known >= logits.shape[-1] and not never:
            return logits
        logits = logits.clone()
        logits[:, known:] = -torch.inf
        logits[:, never] = -torch.inf
        return logits


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """bool [N, V]: the fewest likeliest tokens whose share of the weights is at least top_p, one at least.

    Of equally likely ones at the border the lower ids are in. Holtzman et al. 2020, arXiv:1904.09751, eq. 2.
    """
    wanted = weights.sum(dim=-1, dtype=torch.float64, keepdim=True) * top_p
    size = min(FIRST, weights.shape[-1])
    likeliest = torch.topk(weights, size).values
    if size < weights.shape[-1] and bool((likeliest.sum(dim=-1, dtype=torch.float64) < wanted[:, 0]).any()):
        likeliest = torch.sort(weights, dim=-1, descending=True).values
    reached = likeliest.cumsum(dim=-1, dtype=torch.float64) >= wanted
    reached[:, -1] = True  # the sum of all may round below what is wanted
    count = reached.int().argmax(dim=-1, keepdim=True)  # tokens before the last one that is in
    border = likeliest.gather(-1, count)
    above = weights > border
    missing = count + 1 - above.sum(dim=-1, keepdim=True)
    ties = weights == border
    return above | (ties & (ties.cumsum(dim=-1) <= missing))


def inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [N]: in each row of weights [N, V] the first token up to which they add up to more than `uniform`
    times their sum. Sums are float64; a weight of 0 is never taken where another is above 0.
    """
    rows, vocabulary = weights.shape
    padded = -(-vocabulary // COLUMNS) * COLUMNS
    parts = torch.nn.functional.pad(weights, (0, padded - vocabulary)).view(rows, -1, COLUMNS)
    ends = parts.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = (uniform.to(ends.device) * ends[:, -1])[:, None]
    part = _first_above(ends, target)
    before = ends.gather(-1, (part - 1).clamp(min=0)) * (part > 0)
    inside = parts.gather(1, part[:, :, None].expand(rows, 1, COLUMNS))[:, 0].double().cumsum(dim=-1)
    return (part * COLUMNS + _first_above(inside, target - before))[:, 0]


def _first_above(cumulated: Tensor, target: Tensor) -> Tensor:
    """int64 [N, 1]: the first place above the target; where rounding leaves none, the last one that adds."""
    found = (cumulated <= target).sum(dim=-1, keepdim=True)
    last = (cumulated < cumulated[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last)


def never_drawn(tokenizer: Any, stop_ids: Iterable[int]) -> tuple[int | None, tuple[int, ...]]:
    """(how many ids the tokenizer knows, ids that are not drawn): its padding token, where that ends no turn.

    Other control tokens may be drawn: some models write them in every answer (`<|channel|>`, `[TOOL_CALLS]`).
    They are no danger: a response's text leaves special tokens out, and control strings that are left in it
    are plain text to whoever tokenizes it again.
    """
    if tokenizer is None:
        return None, ()
    pad = tokenizer.pad_token_id
    never = (pad,) if isinstance(pad, int) and pad not in set(stop_ids) else ()
    # Not its length: a vocabulary may have gaps.
    return 1 + max(tokenizer.get_vocab().values(), default=-1), never
