"""What the CPU cannot show, checked on a card: 4-bit load, attention, checkpointing, memory running out.

    python tests/gpu/check_cuda.py            # needs a CUDA card with some 6 GB free; nothing is downloaded
    python tests/gpu/check_cuda.py --small    # a 100M-parameter base instead of a 1B-shaped one

A random NF4 Llama is made on the card. Every check prints one line; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_dpo import attention
from lora_dpo.batching import collate
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.logprobs import token_logprobs
from lora_dpo.losses import DPO
from lora_dpo.model import Model, add_adapter, as_reference
from lora_dpo.recipe import Adapter
from lora_dpo.training.step import step_gradient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from workload import Shape, base_tokenizer, quantized_in_memory, synthetic_pairs

SMALL = Shape(768, 8, 12, 4, 2048, 32768)
BILLION = Shape(2048, 16, 32, 8, 8192, 128256)
"""The shape of Llama 3.2 1B."""

CHECKS: list[Callable[[Any], tuple[bool, str]]] = []


def check(function: Callable[[Any], tuple[bool, str]]) -> Callable[[Any], tuple[bool, str]]:
    CHECKS.append(function)
    return function


class Card:
    """The model on the card and pairs for it."""

    def __init__(self, shape: Shape):
        self.device = torch.device("cuda")
        network = quantized_in_memory(shape, self.device)
        network.set_attn_implementation(attention.NAME)
        self.model = add_adapter(Model(network, base_tokenizer(), torch.bfloat16), Adapter(rank=16), seed=0)
        self.pairs = synthetic_pairs(8, 192, 320, vocabulary=8192)
        self.base = {n: p.detach().clone() for n, p in self.frozen()}

    def frozen(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.model.network.named_parameters() if n not in self.model.trainable]

    def randomize(self) -> None:
        """A fresh adapter has B = 0, which hides every gradient of A."""
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.trainable.values():
                parameter.normal_(0, 0.02, generator=generator)

    def gradient(self, budget: int = 8192) -> tuple[Tensor, int, float, int]:
        """(the gradient as one vector, the budget it took, seconds, peak bytes above the start)"""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, began = torch.cuda.memory_allocated(), time.perf_counter()
        sums = step_gradient(self.model, DPO(), self.pairs, tokens_per_microbatch=budget, seed=0)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() - start
        flat = torch.cat([p.grad.flatten() for p in self.model.trainable.values() if p.grad is not None])
        self.model.network.zero_grad(set_to_none=True)
        return flat, sums.tokens_per_microbatch, seconds, peak


@check
def policy_is_its_reference_at_the_start(card: Card) -> tuple[bool, str]:
    batch = collate(card.pairs, range(len(card.pairs))).to(card.device)
    ratio = batch_logprobs(card.model, DPO(), batch).log_ratio.abs().max().item()
    card.randomize()
    return ratio == 0.0, f"largest log-ratio {ratio:.3g}, must be exactly 0"


@check
def flash_attention_agrees_with_blocks(card: Card) -> tuple[bool, str]:
    """The variable-length kernel, and in brackets one call a block, in bfloat16, against float32 blocks."""
    layout = collate(card.pairs, range(len(card.pairs))).to(card.device).layout
    tokens = len(layout.example)
    if not attention.flash_takes(torch.bfloat16, 64, 64, card.device) or attention.flash_call(False) is None:
        return True, "no flash attention for this card or torch: blocks are used"
    q = torch.randn(1, 8, tokens, 64, device="cuda")
    k, v = torch.randn(2, 1, 2, tokens, 64, device="cuda")
    attend = attention.flash_call(False)
    assert attend is not None
    lines = []
    for window in (None, 100):

        def flash_attends(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            return attention._flash(attend, q, k, v, layout, 0.125, window, None)

        def blocks_attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            return blocks(q, k, v, layout, window)

        half = [x.bfloat16() for x in (q, k, v)]
        exact = with_gradients(blocks_attend, q, k, v)
        flash, masked = with_gradients(flash_attends, *half), with_gradients(blocks_attend, *half)
        for name, truth, ours, plain in zip(("out", "dq", "dk", "dv"), exact, flash, masked, strict=True):
            error, usual = ((x - truth).abs().max().item() for x in (ours, plain))
            lines.append((error <= 2 * usual + 1e-3, f"{name} {error:.2g} ({usual:.2g})"))
    return all(ok for ok, _ in lines), "; ".join(text for _, text in lines)


def with_gradients(attend: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output, and the gradients of its sum of squares by queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    (out.float() ** 2).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def blocks(q: Tensor, k: Tensor, v: Tensor, layout: Any, window: int | None) -> Tensor:
    """Attention block by block, the flash path shut off."""
    kept, attention.flash_takes = attention.flash_takes, lambda *_: False
    try:
        options = {"scaling": 0.125, "branch_layout": layout, "sliding_window": window}
        return attention.branch_attention(torch.nn.Module(), q, k, v, None, **options)[0]
    finally:
        attention.flash_takes = kept


@check
def packed_agrees_with_one_pair_at_a_time(card: Card) -> tuple[bool, str]:
    with torch.no_grad():
        whole = collate(card.pairs, range(len(card.pairs))).to(card.device)
        packed = token_logprobs(card.model, whole)
        alone = torch.cat([token_logprobs(card.model, collate([p], [0]).to(card.device)) for p in card.pairs])
    difference = (packed - alone).abs().mean().item()
    return difference < 0.05, f"mean difference {difference:.2g} nats a token in bfloat16"


@check
def checkpointing_levels_agree(card: Card) -> tuple[bool, str]:
    expected, _, seconds, peak = card.gradient()
    lines, peaks, same = [f"none {seconds:.2f}s {peak / 2**30:.2f} GiB"], [peak], True
    for level in ("layers", "offload"):
        card.model.checkpoint_layers(offload=level == "offload")
        card.gradient()  # pinned memory is made once
        found, _, seconds, peak = card.gradient()
        same &= bool(((found - expected).norm() / expected.norm()).item() < 1e-2)
        lines.append(f"{level} {seconds:.2f}s {peak / 2**30:.2f} GiB")
        peaks.append(peak)
    card.model.offloading = False
    return same and peaks[0] > peaks[1] > peaks[2], ", ".join(lines) + " (each level must take less)"


@check
def memory_that_runs_out_is_survived(card: Card) -> tuple[bool, str]:
    """With room for about half of a step's tokens, the step is packed again and gives the same gradient."""
    expected, _, _, peak = card.gradient(budget=100_000)
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + 0.6 * peak
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        found, budget, _, _ = card.gradient(budget=100_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = ((found - expected).norm() / expected.norm()).item()
    return budget < 100_000 and error < 1e-2, (
        f"allowed {allowed / 2**30:.2f} GiB: budget 100,000 → {budget:,}, gradient off by {error:.2g}"
    )


@check
def float16_gives_finite_gradients(card: Card) -> tuple[bool, str]:
    """Autocast in float16 with the loss scaled, adapters float32; the base itself stays as it was made."""
    model = dataclasses.replace(card.model, compute_dtype=torch.float16)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    step_gradient(
        model,
        DPO(),
        card.pairs[:2],
        tokens_per_microbatch=8192,
        seed=0,
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    finite = all(bool(torch.isfinite(p.grad).all()) for p in model.trainable.values() if p.grad is not None)
    model.network.zero_grad(set_to_none=True)
    return finite, "all finite" if finite else "not finite"


@check
def the_base_is_untouched(card: Card) -> tuple[bool, str]:
    changed = [name for name, p in card.frozen() if not torch.equal(p, card.base[name])]
    with as_reference(card.model):
        pass
    return not changed, "bit-equal" if not changed else f"changed: {changed[:3]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a base of 100M parameters")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was checked")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    card = Card(SMALL if options.small else BILLION)
    failed = 0
    for function in CHECKS:
        try:
            fine, what = function(card)
        except Exception as error:  # each check speaks for itself
            fine, what = False, f"{type(error).__name__}: {error}"
        failed += not fine
        print(f"{'ok    ' if fine else 'FAILED'}  {function.__name__.replace('_', ' ')}: {what}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
