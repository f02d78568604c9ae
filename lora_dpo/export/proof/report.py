"""What an export kept of what was trained: as `export_report.json`, and as lines for a person."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lora_dpo.evaluation import Interval
from lora_dpo.export.proof.bars import bars_for, changes_nothing, missed
from lora_dpo.export.proof.comparing import Comparison
from lora_dpo.run_directory import write_text

FORMAT = 1
FILE = "export_report.json"
Kind = Literal["merged", "adapter", "gguf", "gguf-adapter", "ollama"]


@dataclass(frozen=True)
class Pairs:
    """A comparison on held-out rows. source: where these are from. arithmetic: the dtype of both forward
    passes. exact: nothing but storing can make a difference, to float32's rounding.
    """

    source: str
    arithmetic: str
    found: Comparison
    exact: bool = True


@dataclass(frozen=True)
class OnBase:
    """One base with the adapter, over itself alone, on held-out examples.

    logps_chosen, logps_rejected: mean log-prob of a scored token (of the responses, where rows are no
    pairs: then there is no second). margin_over_quantized: the same margin, over the quantized base.
    """

    name: str
    own_reference: str
    logps_chosen: float
    logps_rejected: float | None
    preference_accuracy: Interval | None
    margin: Interval
    margin_over_quantized: Interval


@dataclass(frozen=True)
class Report:
    """An export's proof.

    base: whose weights a merge added the update to. weights: what the merge measured, {"kept", "error",
    "layers"}; "kept" is None where the update is 0. pairs: base + adapter beside the exported. stored:
    with base="original", the original base + adapter beside the exported, which shows what storing lost.
    not_compared: why there are no pairs. notes: what else a reader should know. accept: the user takes what
    misses the bars.
    """

    kind: Kind
    dtype: str
    base: Literal["dequantized", "original"] = "dequantized"
    weights: Mapping[str, Any] | None = None
    pairs: Pairs | None = None
    stored: Pairs | None = None
    bases: tuple[OnBase, ...] = ()
    not_compared: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    accept: bool = False

    @property
    def judged(self) -> Pairs | None:
        """The comparison that the bars are for: with the function that the weights were to be."""
        return self.pairs if self.base == "dequantized" else self.stored

    @cached_property
    def bars(self) -> dict[str, float]:
        judged = self.judged
        return bars_for(judged is not None, judged is None or judged.exact)

    @cached_property
    def failed(self) -> list[str]:
        return missed(self.bars, self.weights, self.judged.found if self.judged else None)

    @property
    def passed(self) -> bool | None:
        """None where nothing could be compared, and what is known of the weights misses no bar."""
        return False if self.failed else None if self.judged is None else True

    @property
    def accepted(self) -> bool:
        return self.accept and self.passed is False

    def as_dict(self) -> dict[str, Any]:
        """By the schema of `export_report.json`."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "dtype": self.dtype,
            "base": self.base,
            "passed": self.passed,
            "failed": self.failed,
            "accepted": self.accepted,
            "bars": self.bars,
            "weights": None if self.weights is None else dict(self.weights),
            "pairs": None if self.pairs is None else _pairs(self.pairs),
            "stored": None if self.stored is None else _pairs(self.stored),
            "bases": [asdict(one) for one in self.bases] or None,
            "not_compared": self.not_compared,
            "notes": list(self.notes),
        }


def _pairs(pairs: Pairs) -> dict[str, Any]:
    found, (trained, exported) = pairs.found, pairs.found.margin
    accuracy = found.accuracy
    return {
        "source": pairs.source,
        "examples": found.examples,
        "tokens": found.tokens,
        "positions": found.positions,
        "arithmetic": pairs.arithmetic,
        "logprob_difference": {"mean": found.difference, "largest": found.largest_difference},
        "kl": {"mean": found.kl, "largest": found.largest_kl, "trained_from_base": found.moved_kl},
        "top1_agreement": found.top1,
        "preference_accuracy": accuracy and {"trained": asdict(accuracy[0]), "exported": asdict(accuracy[1])},
        "margin": {
            "of": found.of,
            "trained": asdict(trained),
            "exported": asdict(exported),
            "kept": None if found.kept is None else found.kept.mean,
            "kept_interval": None if found.kept is None else {"low": found.kept.low, "high": found.kept.high},
        },
    }


def write_report(report: Report, folder: Path) -> Path:
    """Write `export_report.json` into the export's folder. Raises RunError where that can't be done."""
    file = folder / FILE
    write_text(file, json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    return file


def describe(report: Report) -> list[str]:
    """The report in lines, with what to try where a bar was missed."""
    lines = _weights_lines(report.weights) if report.weights is not None else []
    for pairs, name in ((report.pairs, "base + adapter"), (report.stored, "original base + adapter")):
        lines += _pairs_lines(pairs, name) if pairs is not None else []
    for one in report.bases:
        lines += _base_lines(one)
    if report.not_compared:
        lines.append(f"not compared with base + adapter: {report.not_compared}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"MISSED: {line}" for line in report.failed]
    if report.failed:
        lines.append("accepted all the same (--accept)" if report.accept else advice(report))
    elif report.passed:
        original = "original base + adapter, within the bars: another function than the one that was trained"
        what = original if report.base == "original" else "what was trained, within the bars"
        lines.append(f"passed: the exported model is {what}")
    elif report.kind == "merged":
        lines.append("neither passed nor failed: only the weights were measured, not what the model says")
    return lines


def advice(report: Report) -> str:
    """What to try where a bar was missed."""
    if changes_nothing(report.weights):
        other = "look whether its lora_alpha or its B factors are 0, and whether it was trained at all"
    elif report.kind == "merged" and report.dtype == "bfloat16":
        other = "--dtype float16 or float32 keeps more of a small update"
    elif report.kind == "merged" and report.dtype == "float16":
        other = "--dtype float32 keeps more of a small update"
    else:
        other = "export again, and report what you see if it stays so"
    return f"try: {other}; --accept takes it as it is"


def _weights_lines(weights: Mapping[str, Any]) -> list[str]:
    if changes_nothing(weights):
        return []  # among what was missed
    text = f"update kept by the weights  {weights['kept']:.4f}, error {weights['error']:.4f} of the update"
    changed = [layer for layer in weights.get("layers") or () if layer["kept"] is not None]
    layers = sorted(changed, key=lambda layer: layer["kept"])
    if layers:
        text += f"; least in {layers[0]['name']}: {layers[0]['kept']:.4f}"
    return [text]


def _pairs_lines(pairs: Pairs, name: str) -> list[str]:
    found = pairs.found
    moved = "" if found.moved_kl is None else f"; training moved the base by {found.moved_kl:.1e}"
    lines = [
        f"reloaded and compared with {name} on {found.examples} examples, {found.tokens:,} tokens"
        f" ({pairs.source}; {pairs.arithmetic} arithmetic)",
        f"  |Δ log-prob|        {found.difference:.1e} nats on average,"
        f" {found.largest_difference:.1e} at most",
        f"  KL                  {found.kl:.1e} nats on average, {found.largest_kl:.1e} at most{moved}",
        f"  top-1 agreement     {found.top1:.2%} at {found.positions:,} positions",
    ]
    if found.accuracy is not None:
        lines.append(f"  accuracy            {found.accuracy[0]} trained, {found.accuracy[1]} exported")
    lines.append(f"  margin              {found.margin[0]} trained, {found.margin[1]} exported")
    kept = "not defined: the trained margin is 0" if found.kept is None else str(found.kept)
    lines.append(f"  margin kept         {kept}")
    if found.kept is not None and found.margin[0].low <= 0 <= found.margin[0].high:
        lines.append("                      (the trained margin itself may be 0: this share says little)")
    return lines


def _base_lines(one: OnBase) -> list[str]:
    rejected = "" if one.logps_rejected is None else f", rejected {one.logps_rejected:.3f}"
    accuracy = "" if one.preference_accuracy is None else f"accuracy {one.preference_accuracy}, "
    return [
        f"{one.name}, over {one.own_reference}:",
        f"  {accuracy}margin {one.margin} (over the quantized base {one.margin_over_quantized});"
        f" a token's log-prob chosen {one.logps_chosen:.3f}{rejected}",
    ]
