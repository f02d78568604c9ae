"""What a model says on held-out examples, kept so that two models are never in memory at once.

Legend: `B` examples, `k` sides of an example, `S` scored tokens of all of them, `K` of these whose whole
distributions are kept, `V` vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.evaluation import each_microbatch
from lora_dpo.logprobs import token_logprobs_and_distributions, vocabulary
from lora_dpo.model import Model
from lora_dpo.tokenization import Branches

DISTRIBUTION_BYTES = 128 * 2**20
"""What the whole distributions of one model may take."""

MOST_POSITIONS = 1024


@dataclass(frozen=True, eq=False)
class Said:
    """Log-probs of given examples, all on the CPU.

    tokens: of each scored token, float32 [S]; example by example, and side by side. sums: of each side,
    float64 [B, k]. positions: of which scored tokens whole distributions were kept, int64 [K], ascending.
    distributions: log π(·) there, float32 [K, V].
    """

    tokens: Tensor
    sums: Tensor
    positions: Tensor
    distributions: Tensor


def listen(
    model: Model,
    examples: Sequence[Branches],
    *,
    positions: int = 0,
    tokens_per_microbatch: int = 8192,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Said:
    """What the model says, in the role it is in, on examples that all have as many sides.

    positions: at how many scored tokens whole distributions are kept, evenly spread; fewer where there are
    fewer, and 0 for none. Raises RunError where a single example does not fit in memory.
    """
    rows = [sum(map(item.scored_count, range(item.sides))) for item in examples]
    starts = list(itertools.accumulate(rows, initial=0))
    kept = torch.tensor(spread(positions, starts[-1]), dtype=torch.int64)
    tokens = torch.empty(starts[-1])
    sums = torch.empty(len(examples), examples[0].sides, dtype=torch.float64)
    whole = torch.empty(len(kept), vocabulary(model) if len(kept) else 0)

    def act(batch: MicroBatch, numbers: list[int]) -> None:
        where = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in numbers])
        asked = torch.isin(where, kept).nonzero()[:, 0]
        logprobs, distributions = token_logprobs_and_distributions(model, batch, asked)
        tokens[where] = logprobs.cpu().float()
        sums[numbers] = batch.per_sequence(logprobs).cpu()
        if len(asked):
            whole[torch.searchsorted(kept, where[asked])] = distributions

    each_microbatch(
        model, examples, act, tokens_per_microbatch=tokens_per_microbatch, progress=progress, say=say
    )
    return Said(tokens, sums, kept, whole)


def positions_for(vocabulary: int) -> int:
    """How many whole distributions over so many tokens are kept at most."""
    return min(MOST_POSITIONS, DISTRIBUTION_BYTES // (4 * vocabulary))


def spread(count: int, out_of: int) -> list[int]:
    """At most `count` different numbers from 0 to out_of − 1, evenly spread, ascending."""
    count = min(count, out_of)
    return [(2 * n + 1) * out_of // (2 * count) for n in range(count)]
