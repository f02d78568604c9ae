"""How much memory and time a merge takes, on random Llamas of given sizes.

    python tests/benchmarks/merging.py [--gigabytes 2,4] [--dtype bfloat16] [--quantization nf4] [--in FOLDER]

Each size has the widths of a Llama 3.2 1B: a tied embedding of 128,256 × 2048; only its layers differ in
number. Memory is the peak of anonymous memory above the start, libraries loaded. Time is compared with
reading the base's files and writing as many bytes, both synced, before and after the merge in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import PeakMemory
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_dpo.export.merging.files import Settings, clear, merge
from lora_dpo.export.merging.shards import Part, shards_of, write_shard
from lora_dpo.recipe import Base

EMBEDDING = 128_256 * 2048
LAYER = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048


def make_base(folder: Path, size: float) -> None:
    """A random bf16 Llama of about `size` bytes, written as it is made."""
    layers = max(1, round((size / 2 - EMBEDDING) / LAYER))
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Iterator[Tensor]:
        if len(shape) == 1:
            yield torch.ones(shape, dtype=torch.bfloat16)
            return
        for first in range(0, shape[0], 512):
            rows = torch.empty(min(512, shape[0] - first), shape[1])
            yield rows.normal_(std=0.02, generator=generator).bfloat16()

    parts = [
        Part(name, torch.bfloat16, tuple(p.shape), lambda s=tuple(p.shape): values(s))
        for name, p in network.named_parameters()
    ]
    [every] = shards_of(parts, 10**12)
    write_shard(folder / "model.safetensors", every)


def make_adapter(folder: Path, base: Path, rank: int = 16) -> None:
    """LoRA on every linear layer, of about 0.3% of the weights' norm."""
    from peft import get_peft_model

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    adapted = get_peft_model(network, config, low_cpu_mem_usage=True)
    shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(1)
    std = (3e-3 * 0.02 / 2 / rank**0.5) ** 0.5
    tensors = {n: torch.empty(t.shape).normal_(std=std, generator=generator) for n, t in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))


def copy_seconds(source: Path, target: Path) -> float:
    """Reading a file and writing as many bytes, synced."""
    began, room = time.perf_counter(), memoryview(bytearray(2**24))
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while count := read.readinto(room):
            write.write(room[:count])
        os.fsync(write.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator:
    yield lambda count: None


def measure(work: Path, size: float, dtype: str, quantization: str) -> str:
    base, adapter, out = work / "base", work / "adapter", work / "merged"
    for folder in (base, out):
        folder.mkdir()
    make_base(base, size)
    make_adapter(adapter, base)
    weights = base / "model.safetensors"
    before = copy_seconds(weights, work / "copy")
    recipe = Base(str(base), quantization=quantization, compute_dtype="bfloat16", device="cpu")  # pyright: ignore
    with PeakMemory(torch.device("cpu")) as peak:
        began = time.perf_counter()
        merge(recipe, adapter, out, Settings(getattr(torch, dtype)), counting=counting)
        clear(out)
        took = time.perf_counter() - began
    after = copy_seconds(weights, work / "copy")
    copying = (before + after) / 2
    return (
        f"| {weights.stat().st_size / 1e9:.2f} GB | {peak.bytes / 2**20:,.0f} MiB | {took:.1f} s |"
        f" {before:.1f}, {after:.1f} s | {took / copying:.2f}× |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", default="2,4", help="sizes of the base in bf16")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "fp4", "int8", "none"])
    parser.add_argument("--in", dest="place", help="where the files are made; the system's temporary folder")
    options = parser.parse_args()
    lines = []
    for size in options.gigabytes.split(","):
        work = Path(tempfile.mkdtemp(dir=options.place))
        try:
            lines.append(measure(work, float(size) * 1e9, options.dtype, options.quantization))
        finally:
            shutil.rmtree(work)
    print("| base | peak anonymous memory above start | merge | read + write, before and after | ratio |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
