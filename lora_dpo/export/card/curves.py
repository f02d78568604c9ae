"""A run's curves as a picture: loss, accuracy, margin, log-prob changes and shift over optimizer steps.

Training is drawn light, with its running mean; what was measured on held-out rows as points with a line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.errors import RunError

BLUE, ORANGE = "#0072b2", "#d55e00"
"""Told apart by colour-blind people too (Okabe & Ito)."""
LARGEST = 1e30
"""Numbers beyond are left out, as those that are none: axes can't show them."""
FEW = 30
"""With at most so many points each is marked."""

Points = tuple[np.ndarray, np.ndarray]
"""Steps float64 [n] and values float64 [n], NaN where a record has no number."""


@dataclass(frozen=True)
class Curve:
    """One metric by its name in the records; an evaluation's has eval/ in front, but for shift/."""

    key: str
    label: str
    color: str

    @property
    def held_out(self) -> str:
        return self.key if self.key.startswith("shift/") else f"eval/{self.key}"


@dataclass(frozen=True)
class Panel:
    """What shares one pair of axes. level: where a dotted line is drawn, such as chance."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None
    limits: tuple[float, float] | None = None


def _two(first: str, second: str) -> tuple[Curve, Curve]:
    """Two curves, each labelled by the end of its name."""
    names = (name.rpartition("/")[2] for name in (first, second))
    labels = (name.removesuffix("_change").removesuffix("_gap") for name in names)
    return Curve(first, next(labels), BLUE), Curve(second, next(labels), ORANGE)


PANELS: tuple[tuple[Panel, ...], ...] = (
    (Panel("Loss", "mean loss", (Curve("loss", "", BLUE),)),),
    (
        Panel(
            "Preference accuracy",
            "share of pairs",
            (Curve("rewards/accuracy", "", BLUE),),
            level=0.5,
            limits=(-0.03, 1.03),
        ),
    ),
    (
        Panel("Margin of implicit rewards", "nats, times β", (Curve("rewards/margin", "", BLUE),), level=0),
        Panel("Implicit rewards", "nats, times β", _two("rewards/desirable", "rewards/undesirable"), level=0),
    ),
    (
        Panel(
            "Log-probability against the reference",
            "nats a response",
            _two("logps/chosen_change", "logps/rejected_change"),
            level=0,
        ),
        Panel("Log-probability of responses", "nats a response", _two("logps/chosen", "logps/rejected")),
        Panel("Log-probability of responses", "nats a response", (Curve("logps/completion", "", BLUE),)),
        Panel("Log-probability of responses", "nats a response", (Curve("logps/response", "", BLUE),)),
    ),
    (
        Panel("Own samples likelier than", "nats a token", _two("shift/chosen_gap", "shift/rejected_gap"), 0),
        Panel("Own samples likelier than data", "nats a token", (Curve("shift/response_gap", "", BLUE),)),
        Panel("Own samples likelier than data", "nats a token", (Curve("shift/completion_gap", "", BLUE),)),
    ),
    (Panel("KL from the reference, own samples", "nats a response", (Curve("shift/kl", "", BLUE),), 0),),
)
"""Of each row the first panel that the records have numbers for."""


def draw_curves(records: Iterable[Mapping[str, Any]], file: Path) -> bool:
    """Draw the curves of a run's metrics (`RunDirectory.records`) as a PNG file; False if there is nothing to
    draw.

    The same records give the same bytes. Raises RunError where the file can't be written.
    """
    records = sorted((r for r in records if _number(r.get("step")) is not None), key=lambda r: r["step"])
    train = [record for record in records if record.get("kind") == "step"]
    held_out = [record for record in records if record.get("kind") in ("evaluation", "shift")]
    panels = [
        found
        for options in PANELS
        if (found := next((p for p in options if _drawable(p, train, held_out)), None))
    ]
    if not panels:
        return False
    picture = _picture(panels, train, held_out)
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
    return True


def _number(value: Any) -> float | None:
    """A number that axes can show."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None  # not NaN either: it compares as False


def points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    values = (_number(record.get(key)) for record in records)
    steps = np.array([float(record["step"]) for record in records])
    return steps, np.array([math.nan if value is None else value for value in values])


def _drawable(
    panel: Panel, train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> bool:
    return any(
        bool(np.isfinite(points(records, key)[1]).any())
        for curve in panel.curves
        for records, key in ((train, curve.key), (held_out, curve.held_out))
    )


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours (odd; fewer at the ends) of values [n]; what is NaN counts nowhere,
    and stays NaN.
    """
    known = np.isfinite(values)
    window = np.ones(width)
    half = width // 2
    sums = np.convolve(np.where(known, values, 0.0), window)[half : half + len(values)]
    counts = np.convolve(known.astype(float), window)[half : half + len(values)]
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _picture(
    panels: Sequence[Panel], train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> bytes:
    """The PNG's bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = 1 if len(panels) < 4 else 2
    columns = -(-len(panels) // rows)
    width = 2 * (len(train) // 50) + 1
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would change the picture
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(5 * columns, 3 * rows + 0.4), dpi=144, facecolor="white", layout=layout)
        canvas = FigureCanvasAgg(figure)
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_panel(axes, panel, train, held_out, width)
        _legend(figure, width, bool(train), bool(held_out))
        out = io.BytesIO()
        canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _draw_panel(
    axes: Any,
    panel: Panel,
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    width: int,
) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in panel.curves:
        steps, values = points(train, curve.key)
        few = bool(np.isfinite(values).sum() <= FEW)
        style: dict[str, Any] = {"color": curve.color, "linewidth": 1}
        if width > 1:
            axes.plot(steps, values, alpha=0.2, **style)
            values = running_mean(values, width)
        axes.plot(steps, values, alpha=0.5, marker="." if few else "", markersize=3, **style)
        steps, values = points(held_out, curve.held_out)
        shown = np.isfinite(values)
        style["linewidth"] = 1.8
        axes.plot(steps[shown], values[shown], marker="o", markersize=5, **style)
        if curve.label:
            axes.plot([], [], label=curve.label, **style)
    if panel.level is not None:
        axes.axhline(panel.level, color="#666666", linewidth=0.8, linestyle=":")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, frameon=False)


def _legend(figure: Any, width: int, trained: bool, held_out: bool) -> None:
    """What light lines and points stand for, below all panels."""
    from matplotlib.lines import Line2D

    gray = "#444444"
    mean = f"training, mean over {width} steps" if width > 1 else "training"
    handles = [Line2D([], [], color=gray, alpha=0.5, linewidth=1, label=mean)] if trained else []
    if trained and width > 1:
        handles.insert(0, Line2D([], [], color=gray, alpha=0.2, linewidth=1, label="training, each step"))
    if held_out:
        handles.append(
            Line2D([], [], color=gray, marker="o", markersize=5, linewidth=1.8, label="held-out rows")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
