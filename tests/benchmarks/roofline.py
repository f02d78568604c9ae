"""How near a step comes to the machine's own speed: its FLOP/s over those of a large bf16 matrix product.

    python tests/benchmarks/roofline.py [--profile]

What is counted of a step, and nothing else (norms, softmax, attention's products, LoRA, de-quantization are
work that the ratio charges to the step, without counting it):

  layers  6 × non-embedding parameters × packed tokens: 2 for the policy's forward pass, 2 for its backward
          by the inputs (the frozen base needs no gradient of its weights), 2 for the reference's forward.
  head    on score rows alone, 6·V·D a row: 2·V·D each for the policy's logits, the reference's, and the
          policy's slope, which is the backward pass by the hidden states, finished early.

With --checkpointing a layer's forward pass is done twice; it is still counted once.

The peak is measured in the same process and with the same threads: the best of several bf16 products of two
square matrices, before the steps and again after them; both are shown, and the larger one is the divisor.
Columns: `TFLOP` counted of all timed steps; `seconds` they took; `GFLOP/s` one over the other; `of peak` the
ratio. --profile adds the largest of torch.profiler by self time over one step more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines import Job, LoraDpo
from measuring import conditions, print_conditions, print_table, write_json
from workload import (
    SHARED,
    Shape,
    base_tokenizer,
    distinct_tokens,
    file_pairs,
    save_random_base,
    scored_tokens,
    small_shape,
)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = conditions()
    print_conditions(found)
    shape = small_shape(options.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        base = save_random_base(shape, Path(folder), base_tokenizer())
        engine = LoraDpo(job(options, str(base)))
    steps = step_pairs(options)
    before = matmul_rate(options.matrix, engine.job.device)
    run = engine.run(steps)
    after = matmul_rate(options.matrix, engine.job.device)
    kept = slice(1, None)
    result = rates(shape, steps[kept], run.seconds[kept], before, after)
    report(result, options)
    if options.profile:
        profile(engine, steps[-1], options.profile)
    write_json(options.json, {"conditions": found, "results": result})


def parse() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--data", default=str(SHARED / "data" / "ultrafeedback_200.json"))
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest side")
    parser.add_argument("--steps", type=int, default=5, help="timed, after 1 to warm up")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--matrix", type=int, default=4096, help="side of the matrices of the peak's product")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: its own choice")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument(
        "--profile", type=int, nargs="?", const=20, default=0, metavar="ROWS", help="of torch.profiler"
    )
    parser.add_argument("--json", type=Path, help="write the measurement there")
    return parser.parse_args()


def job(options: argparse.Namespace, base: str) -> Job:
    return Job(
        engine="lora_dpo",
        base=base,
        tokens_per_microbatch=options.tokens_per_microbatch,
        checkpointing=options.checkpointing,
        cuda=options.cuda,
    )


def step_pairs(options: argparse.Namespace) -> list[list[Any]]:
    count = options.pairs * (1 + options.steps)
    pairs = file_pairs(options.data, base_tokenizer(), options.max_tokens, count)
    return [pairs[start : start + options.pairs] for start in range(0, count, options.pairs)]


def matmul_rate(side: int, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several bf16 products of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    fastest = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def counted_flops(shape: Shape, tokens: int, rows: int) -> tuple[float, float]:
    """(layers, head) of so many packed tokens and score rows; see the top of this file."""
    return 6.0 * shape.non_embedding_parameters * tokens, 6.0 * shape.vocabulary * shape.hidden * rows


def rates(
    shape: Shape, steps: list[list[Any]], seconds: list[float], before: float, after: float
) -> dict[str, Any]:
    pairs = [pair for step in steps for pair in step]
    tokens, rows = distinct_tokens(pairs), scored_tokens(pairs)
    layers, head = counted_flops(shape, tokens, rows)
    achieved = (layers + head) / sum(seconds)
    return {
        "tokens": tokens,
        "score rows": rows,
        "layers' TFLOP": layers / 1e12,
        "head's TFLOP": head / 1e12,
        "TFLOP": (layers + head) / 1e12,
        "seconds": sum(seconds),
        "GFLOP/s": achieved / 1e9,
        "peak before": before / 1e9,
        "peak after": after / 1e9,
        "of peak": achieved / max(before, after),
    }


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    checkpointing = "on" if options.checkpointing else "off"
    print(
        f"\nbfloat16, {torch.get_num_threads()} threads, checkpointing {checkpointing},"
        f" {options.tokens_per_microbatch} tokens a micro-batch, {options.steps} steps of"
        f" {options.pairs} pairs\npeaks: GFLOP/s of {options.matrix} × {options.matrix} bf16 products"
    )
    print_table([result])


def profile(engine: LoraDpo, pairs: list[Any], rows: int) -> None:
    """The operations that took most time of their own in one step."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (engine.job.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as found:
        engine.step(pairs, step=0)
    by = "self_cuda_time_total" if engine.job.device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=50))


if __name__ == "__main__":
    main()
