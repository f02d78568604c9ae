"""A step in a process whose memory the system limits; test_out_of_memory.py runs it."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from builders import build, gradient, llama_config, random_branches, relative, with_random_adapter

from lora_dpo.attention import NAME
from lora_dpo.losses import DPO
from lora_dpo.model import Model, add_adapter
from lora_dpo.recipe import Adapter
from lora_dpo.training.step import step_gradient

TOKENS = 8 * 260


def data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(room: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build(llama_config(hidden_size=256, intermediate_size=1024)).requires_grad_(False)
    network.set_attn_implementation(NAME)
    bare = Model(network, None, torch.float32)  # pyright: ignore[reportArgumentType]
    model = with_random_adapter(add_adapter(bare, Adapter(rank=4)))
    rng = np.random.default_rng(0)
    items = [random_branches(rng, 60, (100, 100), row=n) for n in range(8)]
    step_gradient(model, DPO(), items, tokens_per_microbatch=600, seed=0)
    expected, said = gradient(model), []
    limit = data_bytes() + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    sums = step_gradient(model, DPO(), items, tokens_per_microbatch=TOKENS, seed=0, say=said.append)
    print(sums.out_of_memory_retries, sums.tokens_per_microbatch, relative(gradient(model), expected))
    print(*said, sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) * 2**20)
