"""A run's curves become a picture: the same one each time, whatever the records lack."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from lora_dpo.errors import RunError
from lora_dpo.export.card import curves
from lora_dpo.export.card.curves import draw_curves, points, running_mean

METRICS = ("loss", "rewards/accuracy", "rewards/margin", "logps/chosen_change", "logps/rejected_change")

SHIFT = ("Own samples likelier than", "KL from the reference, own samples")
THREE = ("Loss", "Preference accuracy", "Margin of implicit rewards")


def records(steps: int, metrics: tuple[str, ...] = METRICS, every: int = 4) -> list[dict[str, Any]]:
    """Steps with an evaluation after each `every`; every metric a different line."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        values = {name: (n + 1) / step for n, name in enumerate(metrics)}
        of_step = {name: value for name, value in values.items() if "shift/" not in name}
        found.append({"step": step, "kind": "step", **of_step})
        if step % every == 0:
            held_out = {
                name if "shift/" in name else f"eval/{name}": value + 0.1 for name, value in values.items()
            }
            found.append({"step": step, "kind": "evaluation", **held_out})
    return found


def titles(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, file: Path) -> list[str]:
    """The panels that are drawn for these records."""
    drawn: list[str] = []
    draw = curves._draw_panel

    def watched(axes: Any, panel: curves.Panel, *others: Any) -> None:
        drawn.append(panel.title)
        draw(axes, panel, *others)

    monkeypatch.setattr(curves, "_draw_panel", watched)
    assert draw_curves(found, file) == bool(drawn)
    return drawn


def test_the_same_records_give_the_same_bytes_whatever_the_users_style(tmp_path: Path):
    assert draw_curves(records(60), tmp_path / "a.png")
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20, "lines.linewidth": 9}
    ):
        assert draw_curves(iter(records(60)), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_picture_is_opaque_and_names_no_software(tmp_path: Path):
    assert draw_curves(records(8), tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")
    assert (pixels[..., 3] == 1).all()
    assert (pixels[0, 0] == 1).all(), "on a dark page it must bring its own white"
    assert pixels[..., :3].std() > 0.05
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_drawing_opens_no_window_and_reading_the_module_loads_nothing(tmp_path: Path):
    assert draw_curves(records(3), tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules
    tree = ast.parse(Path(curves.__file__).read_text(encoding="utf-8"))
    loaded = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in loaded if "matplotlib" in line]


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [
        (METRICS, [*THREE, "Log-probability against the reference"]),
        (("loss", "logps/response"), ["Loss", "Log-probability of responses"]),  # SFT
        (
            ("loss", "rewards/desirable", "rewards/undesirable", "logps/completion"),  # KTO
            ["Loss", "Implicit rewards", "Log-probability of responses"],
        ),
        (
            ("loss", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected"),  # no reference
            [*THREE, "Log-probability of responses"],
        ),
        (
            (*METRICS, "shift/chosen_gap", "shift/rejected_gap", "shift/kl"),
            [*THREE, "Log-probability against the reference", *SHIFT],
        ),
        (("loss", "shift/completion_gap"), ["Loss", "Own samples likelier than data"]),
    ],
)
def test_each_kind_of_objective_has_its_panels(
    metrics: tuple[str, ...], panels: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert titles(records(9, metrics), monkeypatch, tmp_path / "a.png") == panels


@pytest.mark.parametrize("steps", [1, 3])
def test_few_records_are_enough(steps: int, tmp_path: Path):
    assert draw_curves(records(steps), tmp_path / "a.png")


def test_evaluations_alone_are_drawn(tmp_path: Path):
    assert draw_curves([r for r in records(9) if r["kind"] == "evaluation"], tmp_path / "a.png")


@pytest.mark.parametrize(
    "found",
    [
        [],
        [{"step": 1, "kind": "step"}],
        [{"step": 1, "kind": "step", "loss": None}, {"step": 2, "kind": "evaluation", "eval/loss": None}],
        [{"step": 1, "kind": "step", "loss": "0.5"}, {"step": 2, "kind": "step", "loss": True}],
        [{"step": None, "kind": "step", "loss": 1.0}, {"step": 1, "kind": "other", "loss": 1.0}],
        [{"step": 1, "kind": "step", "loss": float("nan")}, {"step": 2, "kind": "step", "loss": 10**400}],
    ],
)
def test_where_there_is_nothing_to_draw_there_is_no_file(found: list[dict[str, Any]], tmp_path: Path):
    assert not draw_curves(found, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_steps_without_a_number_are_gaps(tmp_path: Path):
    found = records(40)
    for record in found[5:9]:
        record |= {name: None for name in record if name not in ("step", "kind")}
    found[20]["loss"] = 1e300
    steps, values = points([r for r in found if r["kind"] == "step"], "loss")
    assert steps.tolist() == list(range(1, 41))
    # After every fourth step an evaluation stands between: places 5 to 8 are steps 5 to 8, place 20 is 17.
    assert np.flatnonzero(np.isnan(values)).tolist() == [4, 5, 6, 7, 16]
    assert draw_curves(found, tmp_path / "a.png")


def test_a_running_mean_is_that_of_the_numbers_around():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert running_mean(values, 1).tolist()[:2] == [1.0, 2.0]
    expected = [1.5, 1.5, np.nan, 6.5, 6.5]
    np.testing.assert_array_equal(running_mean(values, 3), expected)
    np.testing.assert_allclose(running_mean(values, 11)[[0, 1, 3, 4]], 4.0)


def test_a_file_that_cannot_be_written_is_an_error_in_words(tmp_path: Path):
    with pytest.raises(RunError, match="cannot write"):
        draw_curves(records(3), tmp_path / "missing" / "a.png")


def test_what_was_measured_on_own_samples_alone_is_drawn(tmp_path: Path):
    found = [{"step": step, "kind": "shift", "shift/kl": step / 2} for step in (0, 10)]
    assert draw_curves(found, tmp_path / "a.png")
