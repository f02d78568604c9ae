"""Set before any library is imported: no test touches the network."""

from __future__ import annotations

import json
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

# A shell that starts the tests in its background may have them, and all that they start, ignore SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' models are tiny: a second thread costs them more than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_cache_at_home(tmp_path_factory: pytest.TempPathFactory):
    """What outlives a run lies under a folder of the tests', not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(no_cache_at_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And no test finds what another one left there."""
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a random chat model."""
    from builders import save_small_model

    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(small_model: Path, tmp_path: Path):
    """Six steps on forty random pairs, the last eight held out."""
    from builders import pair_rows

    from lora_dpo.recipe import Adapter, Base, Data, Recipe, Shift, Training

    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    return Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(rows), eval_last=8),
        adapter=Adapter(rank=4, dropout=0.1),
        training=Training(
            pairs_per_step=8, learning_rate=1e-2, epochs=20, max_steps=6, tokens_per_microbatch=400
        ),
        shift=Shift(prompts=2, responses=1, max_new_tokens=4),
        run_directory=str(tmp_path / "run"),
    )
