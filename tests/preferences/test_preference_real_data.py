"""Real public sets, beside the repository; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dpo.preferences import BadRowError, load_demonstrations, load_preferences
from lora_dpo.recipe import Data

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not beside the repository")


def test_politeness_has_six_rows_whose_sides_are_identical() -> None:
    file = str(SHARED / "politeness_900.json")
    with pytest.raises(BadRowError, match="row 123: identical sides"):
        load_preferences(Data(file))
    loaded = load_preferences(Data(file, on_bad_row="skip", eval_last=100))
    assert loaded.skipped == {"identical sides": 6}
    assert len(loaded.train) + len(loaded.eval) + loaded.leaked == 894
    assert {record.where.row for record in loaded.eval} <= set(range(801, 901))
    assert len(load_demonstrations(Data(file)).train) == 900


def test_every_ultrafeedback_row_is_usable() -> None:
    loaded = load_preferences(Data(str(SHARED / "ultrafeedback_200.json")))
    assert len(loaded.train) == 200
    assert {len(record.chosen) for record in loaded.train} == {1}


def test_the_noise_of_hh_is_counted_by_reason() -> None:
    loaded = load_preferences(Data(str(SHARED / "hh_harmless_1812.jsonl.gz"), on_bad_row="skip"))
    assert loaded.skipped == {"empty response": 4, "roles out of order": 3, "prompts differ": 2}
    assert len(loaded.train) == 1803
