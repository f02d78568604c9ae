"""Set before any library is imported: no test touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tempfile

import pytest
import torch

# The tests' models are tiny: a second thread costs them more than it gives.
torch.set_num_threads(1)

_cache = tempfile.TemporaryDirectory(prefix="lora_dpo-tests-")
os.environ["LORA_DPO_CACHE"] = _cache.name  # nothing is left in the user's own


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a random chat model."""
    from builders import save_small_model

    return save_small_model(tmp_path_factory.mktemp("model"))
