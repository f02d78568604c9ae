"""When an export is not what was trained: stated numbers, and which of them were missed.

What they come from: a 10M chat model on 4-bit weights (NF4, rank 16, 296 steps of 16 pairs), merged, and
compared in float32 arithmetic on 99 held-out pairs (`tests/benchmarks/merge_dtypes.py`).

    learning rate, merge     margin kept, 95%         update kept   KL over KL to the base   top-1
    5e-6  bfloat16           0.714 [0.699, 0.725]     0.686         0.067                    0.997
    1e-5  bfloat16           0.929 [0.923, 0.933]     0.912         0.0044                   1
    2e-5  bfloat16           0.994 [0.992, 0.996]     0.991         0.0001                   0.999
    1e-4  bfloat16           1.000 [1.000, 1.000]     1.000         0.000002                 0.998
    5e-6  float16            0.998 [0.997, 1.000]     1.000         0.0003                   1
    5e-6  4-bit, by peft     0.008 [-0.009, 0.024]    0.007         0.998                    0.989
    1e-4  4-bit, by peft     0.160 [0.140, 0.180]     0.243         0.558                    0.643

The update that the weights kept foretells the margin. The base without any adapter agrees on 0.989 of the
likeliest tokens at 5e-6: top-1 agreement shows a broken export, not a lost update; KL's share shows both. In
bfloat16 arithmetic base + adapter differ from themselves in float32 by a KL of 1e-4, in top-1 0.987.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.evaluation import Interval
from lora_dpo.export.proof.comparing import Comparison

MARGIN_KEPT_LOW, MARGIN_KEPT_HIGH = "margin_kept_low", "margin_kept_high"
TOP1, KL_SHARE, KL_NOISE, UPDATE_KEPT = "top1_agreement", "kl_share", "kl_noise", "update_kept"

EXACT = {MARGIN_KEPT_LOW: 0.95, MARGIN_KEPT_HIGH: 1.05, TOP1: 0.98, KL_SHARE: 0.05, KL_NOISE: 1e-6}
"""Where what differs is how the weights were stored, and nothing else.

margin_kept_low, margin_kept_high: missed where the whole 95% interval of the margin kept lies outside, so
that few pairs alone miss nothing. top1_agreement: a single position alone misses nothing. kl_share: KL(base +
adapter ‖ exported) over KL(base + adapter ‖ base), how far storing moved the model over how far training did;
a mean KL up to kl_noise nats is rounding.
"""

ROUGH = {MARGIN_KEPT_LOW: 0.8, MARGIN_KEPT_HIGH: 1.25, TOP1: 0.95, KL_SHARE: 0.05, KL_NOISE: 1e-3}
"""Where the forward passes themselves round: 16-bit arithmetic, and on a card int8 bases, which round their
inputs.
"""

WEIGHTS = {UPDATE_KEPT: 0.95}
"""The share of the update that the stored weights kept, ⟨stored − W, ΔW⟩ / ‖ΔW‖² over all of them."""


def bars_for(compared: bool, exact: bool = True) -> dict[str, float]:
    """The bars of an export. compared: on held-out rows. exact: nothing but storing can make a difference."""
    return dict(WEIGHTS) | ({} if not compared else EXACT if exact else ROUGH)


NOTHING = "the adapter changes nothing: its update is 0 in every weight, so that what is stored is the base"


def changes_nothing(weights: Mapping[str, Any] | None) -> bool:
    """Whether there was an update to keep, by what a merge measured."""
    return weights is not None and weights["kept"] is None


def missed(
    bars: Mapping[str, float], weights: Mapping[str, Any] | None, found: Comparison | None
) -> list[str]:
    """Each bar that was missed, in words; what was not measured misses none."""
    lines = []
    if changes_nothing(weights):
        lines.append(NOTHING)
    elif weights is not None and UPDATE_KEPT in bars and not weights["kept"] >= bars[UPDATE_KEPT]:
        lines.append(f"the weights kept {weights['kept']:.3f} of the update; the bar is {bars[UPDATE_KEPT]}")
    if found is None:
        return lines
    low, high = bars[MARGIN_KEPT_LOW], bars[MARGIN_KEPT_HIGH]
    if found.kept is not None and not _meets(found.kept, low, high):
        lines.append(f"the margin kept is {found.kept}; the bars are {low} and {high}")
    if not (found.top1 >= bars[TOP1] or (1 - found.top1) * found.positions < 1.5):
        lines.append(f"top-1 agreement is {found.top1:.4f}; the bar is {bars[TOP1]}")
    share = bars[KL_SHARE] * (found.moved_kl or 0.0)
    if not found.kl <= max(share, bars[KL_NOISE]):
        why = f"{bars[KL_SHARE]:.0%} of the {found.moved_kl:.1e} that training moved the base"
        bar = f"{share:.1e}, {why}" if share > bars[KL_NOISE] else f"{bars[KL_NOISE]:.0e}"
        lines.append(f"KL(base + adapter ‖ exported) is {found.kl:.1e} nats; the bar is {bar}")
    return lines


def _meets(kept: Interval, low: float, high: float) -> bool:
    """Whether the interval reaches into the bars; what is not a number doesn't."""
    return kept.high >= low and kept.low <= high
