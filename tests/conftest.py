"""Set before any library is imported: no test touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# The tests' models are tiny: a second thread costs them more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_in_the_home(tmp_path_factory: pytest.TempPathFactory):
    """What is kept between runs goes to a folder of this session's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a random chat model."""
    from builders import save_small_model

    return save_small_model(tmp_path_factory.mktemp("model"))
