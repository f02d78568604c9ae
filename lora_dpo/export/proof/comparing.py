"""Two models on the same held-out examples: base + adapter, and what was exported.

Legend: `B` examples, `K` positions with whole distributions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_dpo.evaluation import BOOTSTRAP_SAMPLES, Interval, bootstrap
from lora_dpo.export.proof.said import Said
from lora_dpo.losses import preferred
from lora_dpo.tokenization import Branches

PAIRS = "log-ratio of the chosen response less that of the rejected one"
RATINGS = "log-ratio of the response, with the sign turned where the rating is down"
RESPONSES = "log-ratio of the response"
MARGINS = {"pairs": PAIRS, "ratings": RATINGS, "demonstrations": RESPONSES}
"""What the margin of an example is, by what the rows are read as; a log-ratio is log π − log ref."""


@dataclass(frozen=True)
class Comparison:
    """What was exported, beside base + adapter, on held-out examples.

    tokens: scored tokens compared; difference, largest_difference: |Δ log-prob| of one, in nats. positions:
    where whole distributions were compared; kl, largest_kl: KL(base + adapter ‖ exported) there, in nats;
    top1: the share of them where both think the same token the likeliest. moved_kl: KL(base + adapter ‖
    base), as far as training moved the base; None where it wasn't measured.
    accuracy: preference accuracy, implicit reward of chosen above that of rejected (a tie is a half); None
    for rows that aren't pairs. margin: see `MARGINS`; both against the same reference. Each of base + adapter
    and of the exported. kept: exported margin over trained margin, with its 95% interval over resampled
    examples; None where the trained margin is 0.
    """

    examples: int
    tokens: int
    positions: int
    difference: float
    largest_difference: float
    kl: float
    largest_kl: float
    top1: float
    moved_kl: float | None
    of: str
    accuracy: tuple[Interval, Interval] | None
    margin: tuple[Interval, Interval]
    kept: Interval | None


def compare(
    trained: Said, base: Said, exported: Said, examples: Sequence[Branches], records: str = "pairs"
) -> Comparison:
    """Base + adapter, the base alone (the reference of both) and the exported model, on the same examples.

    records: what the rows were read as. Both `trained` and `exported` hold distributions at the same
    positions; `base` may.
    """
    gap = (exported.tokens.double() - trained.tokens.double()).abs()
    apart = divergence(trained.distributions, exported.distributions)
    same = trained.distributions.argmax(dim=-1) == exported.distributions.argmax(dim=-1)
    moved = divergence(trained.distributions, base.distributions) if len(base.positions) else None
    margins = [margins_of(said, base, examples, records) for said in (trained, exported)]
    return Comparison(
        examples=len(examples),
        tokens=len(gap),
        positions=len(apart),
        difference=gap.mean().item(),
        largest_difference=gap.max().item(),
        kl=apart.mean().item(),
        largest_kl=apart.max().item(),
        top1=same.double().mean().item(),
        moved_kl=None if moved is None else moved.mean().item(),
        of=MARGINS[records],
        accuracy=None if records != "pairs" else (accuracy_of(margins[0]), accuracy_of(margins[1])),
        margin=(bootstrap(margins[0]), bootstrap(margins[1])),
        kept=share_kept(*margins),
    )


def divergence(trained: Tensor, other: Tensor) -> Tensor:
    """KL(trained ‖ other) in nats of each row, from log-distributions [K, V]: float64 [K]."""
    rows = zip(trained, other, strict=True)
    # In float64, a row at a time: of distributions so close float32 would leave rounding, and below zero.
    found = [(p.double().exp() * (p.double() - q.double())).sum() for p, q in rows]
    return torch.stack(found).clamp_min(0)


def margins_of(said: Said, reference: Said, examples: Sequence[Branches], records: str) -> Tensor:
    """The margin of each example, without β: float64 [B]."""
    ratio = said.sums - reference.sums
    if records == "pairs":
        return ratio[:, 0] - ratio[:, 1]
    if records == "ratings":
        signs = [1.0 if item.values["desirable"] else -1.0 for item in examples]
        return ratio[:, 0] * torch.tensor(signs, dtype=torch.float64)
    return ratio[:, 0]


def accuracy_of(margins: Tensor) -> Interval:
    return bootstrap(preferred(margins, torch.zeros_like(margins)))


def share_kept(trained: Tensor, exported: Tensor) -> Interval | None:
    """Mean exported margin over mean trained margin, from those of the same examples, [B] each.

    The interval resamples examples, each with both its margins: what both models have in common doesn't
    widen it. None where the trained mean is 0.
    """
    t, e = trained.numpy(), exported.numpy()
    if t.mean() == 0:
        return None
    rng = np.random.default_rng(0)
    picks = (rng.integers(0, len(t), len(t)) for _ in range(BOOTSTRAP_SAMPLES))
    sums = np.array([(t[pick].sum(), e[pick].sum()) for pick in picks])
    sums = sums[sums[:, 0] != 0]
    low, high = np.percentile(sums[:, 1] / sums[:, 0], [2.5, 97.5])
    return Interval(float(e.mean() / t.mean()), float(low), float(high))
