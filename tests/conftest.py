"""Set before any library is imported: no test touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

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
