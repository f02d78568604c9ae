"""The main job on real text and a model trained on it; skipped where those sets are not beside the
checkout.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from builders import SHARED

from lora_dpo.evaluation import evaluate
from lora_dpo.finished import open_finished
from lora_dpo.recipe import Base, Data, Recipe, Training
from lora_dpo.training import Display, prepare_data, train

pytestmark = pytest.mark.skipif(not (SHARED / "models" / "chat-10m").is_dir(), reason="no ../shared")


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("politeness_900.json", 16), ("hh_harmless_1812.jsonl.gz", 8), ("ultrafeedback_200.json", 4)],
)
def test_a_few_steps_on_a_real_set_lower_the_loss_and_tell_its_pairs_apart(
    tmp_path: Path, name: str, pairs: int
):
    """From loading to evaluation; the preflight inside checks packing against the model's own attention."""
    recipe = Recipe(
        base=Base(str(SHARED / "models" / "chat-10m")),
        data=Data(str(SHARED / "data" / name), eval_last=24, max_rows=16, max_tokens=320, on_bad_row="skip"),
        training=Training(
            pairs_per_step=pairs, epochs=50, max_steps=12, learning_rate=4e-4, schedule="constant"
        ),
        run_directory=str(tmp_path / "run"),
    )
    run = train(recipe, quiet=True)
    steps = [record for record in run.records() if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(record["loss"] for record in steps[-3:]) / 3 < 0.66
    finished = open_finished(run.path)
    assert finished.data.eval
    met = prepare_data(
        recipe.data, recipe.loss, finished.model.tokenizer, seed=0, display=Display(quiet=True)
    ).train[:16]
    assert evaluate(finished.model, recipe.loss, met).means()["rewards/accuracy"] > 0.7
