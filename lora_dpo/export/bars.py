"""When an export is not what was trained: stated numbers, and which of them were missed.

Measured on a 10M chat model (NF4, bfloat16, rank 16, 296 steps of 16 pairs, 64 held-out pairs, float32
arithmetic; `tests/benchmarks/merge_dtypes.py` makes the whole table):
BARS_TABLE
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.evaluation import Interval
from lora_dpo.export.comparing import Comparison

MARGIN_KEPT_LOW, MARGIN_KEPT_HIGH = "margin_kept_low", "margin_kept_high"
TOP1, KL_SHARE, KL_NOISE, UPDATE_KEPT = "top1_agreement", "kl_share", "kl_noise", "update_kept"

EXACT = {MARGIN_KEPT_LOW: 0.95, MARGIN_KEPT_HIGH: 1.05, TOP1: 0.98, KL_SHARE: 0.05, KL_NOISE: 1e-6}
"""Where what differs is how the weights were stored, and nothing else.

margin_kept_low, margin_kept_high: missed where the whole 95% interval of the margin kept lies outside: few
pairs alone miss nothing. kl_share: KL(base + adapter ‖ exported) over KL(base + adapter ‖ base), how far
storing moved the model over how far training did; a mean KL up to kl_noise nats is rounding.
"""

ROUGH = {MARGIN_KEPT_LOW: 0.8, MARGIN_KEPT_HIGH: 1.25, TOP1: 0.95, KL_SHARE: 0.05, KL_NOISE: 1e-3}
"""Where the forward passes themselves round: 16-bit arithmetic, and on a card int8 bases, which round their
inputs.
"""

WEIGHTS = {UPDATE_KEPT: 0.9}
"""The share of the update that the stored weights kept, ⟨stored − W, ΔW⟩ / ‖ΔW‖² over all of them."""


def bars_for(compared: bool, exact: bool = True) -> dict[str, float]:
    """The bars of an export. compared: on held-out rows. exact: nothing but storing can make a difference."""
    return dict(WEIGHTS) | ({} if not compared else EXACT if exact else ROUGH)


def missed(
    bars: Mapping[str, float], weights: Mapping[str, Any] | None, found: Comparison | None
) -> list[str]:
    """Each bar that was missed, in words; what was not measured misses none."""
    lines = []
    if weights is not None and UPDATE_KEPT in bars and not weights["kept"] >= bars[UPDATE_KEPT]:
        lines.append(f"the weights kept {weights['kept']:.3f} of the update; the bar is {bars[UPDATE_KEPT]}")
    if found is None:
        return lines
    low, high = bars[MARGIN_KEPT_LOW], bars[MARGIN_KEPT_HIGH]
    if found.kept is not None and not _meets(found.kept, low, high):
        lines.append(f"the margin kept is {found.kept}; the bars are {low} and {high}")
    if not found.top1 >= bars[TOP1]:
        lines.append(f"top-1 agreement is {found.top1:.4f}; the bar is {bars[TOP1]}")
    most = max(bars[KL_SHARE] * (found.moved_kl or 0.0), bars[KL_NOISE])
    if not found.kl <= most:
        moved = f", and {bars[KL_SHARE]:.0%} of the {found.moved_kl:.1e} that training moved the base"
        lines.append(
            f"KL(base + adapter ‖ exported) is {found.kl:.1e} nats; the bar is {bars[KL_NOISE]:.0e}"
            + (moved if found.moved_kl is not None else "")
        )
    return lines


def _meets(kept: Interval, low: float, high: float) -> bool:
    """Whether the interval reaches into the bars; what is not a number doesn't."""
    return kept.high >= low and kept.low <= high
