"""lora_dpo's training step beside TRL 1.16's DPOTrainer: the same machine, base, pairs, order and optimizer.

    pip install -e ".[bench]"
    python tests/benchmarks/compare_trl.py        # time and memory, three rows
    python tests/benchmarks/compare_trl.py --agree       # float32: do the two losses agree?
    python tests/benchmarks/compare_trl.py --cuda        # 8B-shaped base on a card
    python tests/benchmarks/compare_trl.py --cuda --search 16384 --cuda-memory 8 12 16 24   # what fits?

The base is a random Llama (40M parameters at a vocabulary of 16,384), quantized to NF4 with double
quantization from one checkpoint on disk; a hash shows that both engines hold the same bytes. LoRA of rank
16, alpha 32, on all linear layers, no dropout, the same first values; AdamW, gradient norm clipped to 1;
bfloat16 autocast. The pairs are real text, tokenized by lora_dpo; TRL gets the same ids in its own columns
and the token counts are asserted. Every measurement is a fresh process, the engines alternating.

How TRL is set up: adapter passed as `peft_config`, so that the reference is the base with the adapter off,
computed on-line; `bf16=True`; sdpa attention; gradient checkpointing as on our side (off, unless
--checkpointing); no truncation; no logging, saving or tracking inside the steps;
per_device_train_batch_size each of --trl-batches, with gradient accumulation up to the step, and the ratios
take the fastest of them. Its tokenization is bypassed (that is before training in both). TRL stores a
quantized model's adapter in bfloat16, lora_dpo in float32; --agree makes TRL's float32 too.

Columns: `s/step` median over the timed steps; `pairs/s`, `tokens/s` over all of them, a token that both
sides share counted once, in both engines; `computed/s` what went through the model instead (TRL: both sides
with padding); `peak GiB` the most memory above what was in use just before the first step, with the model
loaded (CPU: anonymous memory, sampled every 20 ms; CUDA: torch's allocator). `cached` is lora_dpo in its
second epoch over the same pairs, reference log-probs read from its cache; `first epoch / cached` is the
median over steps of the time without it, run right before, over the time with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines import Job, in_fresh_process
from measuring import conditions, print_conditions, print_table, write_json
from workload import SHARED, base_tokenizer, save_random_base, small_shape

BAR = 1e-4
"""How far the engines' losses may differ in --agree."""


@dataclass(frozen=True)
class Row:
    """A line of the comparison: which pairs, how many a step, how long, and how large the vocabulary."""

    name: str
    file: str
    pairs: int
    max_tokens: int
    vocabulary: int = 16384


ROWS = (
    Row("ultrafeedback", "ultrafeedback_200.json", 4, 1024),
    Row("hh", "hh_harmless_1812.jsonl.gz", 16, 512),
    Row("ultrafeedback-128k", "ultrafeedback_200.json", 4, 1024, 131072),
)


def main() -> None:
    options = parse()
    found = conditions()
    print_conditions(found)
    if options.cuda:
        results = search(options) if options.search else compare_on_cuda(options)
    else:
        results = agree(options) if options.agree else compare(options)
    write_json(options.json, {"conditions": found, "results": results})


def parse() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--agree", action="store_true", help="losses of 10 float32 steps, instead of times")
    parser.add_argument(
        "--steps", type=int, help="timed steps, after 1 to warm up (5); with --agree: steps (10)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes per engine, alternating")
    parser.add_argument("--trl-batches", type=int, nargs="+", default=[1, 2, 4], help="pairs a TRL forward")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048, help="lora_dpo's memory budget")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--learning-rate", type=float, help="5e-5; with --agree 5e-4")
    parser.add_argument("--max-tokens", type=int, help="longest side, instead of the row's own (a quick try)")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of the preference files")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: its own choice")
    parser.add_argument("--vocabulary", type=int, help="of every row, instead of its own")
    parser.add_argument("--cuda", action="store_true", help="8B-shaped base and synthetic pairs on a card")
    parser.add_argument(
        "--cuda-memory", type=float, nargs="+", default=[], metavar="GB", help="of the emulated card"
    )
    parser.add_argument(
        "--search", type=int, default=0, metavar="TOKENS", help="longest side that trains, up to this"
    )
    parser.add_argument("--json", type=Path, help="write every measurement there")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of each chosen row."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for row in chosen_rows(options):
            results += run_in_turn(
                row.name, jobs(row, checkpoint(row, Path(folder)), options), options.repeats
            )
    report(results, options)
    return results


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    rows = [row for row in ROWS if row.name in options.rows]
    changes = {"max_tokens": options.max_tokens, "vocabulary": options.vocabulary}
    return [replace(row, **{name: value for name, value in changes.items() if value}) for row in rows]


def checkpoint(row: Row, folder: Path) -> str:
    """The random base of the row's vocabulary, made once."""
    base = folder / str(row.vocabulary)
    if not base.exists():
        save_random_base(small_shape(row.vocabulary), base, base_tokenizer())
    return str(base)


def jobs(row: Row, base: str, options: argparse.Namespace) -> list[Job]:
    """lora_dpo's measurement, and TRL's at each batch that divides the step."""
    ours = Job(
        engine="lora_dpo",
        base=base,
        data=str(options.data / row.file),
        pairs_per_step=row.pairs,
        max_tokens=row.max_tokens,
        steps=options.steps or 5,
        checkpointing=options.checkpointing,
        tokens_per_microbatch=options.tokens_per_microbatch,
        learning_rate=options.learning_rate or 5e-5,
        threads=options.threads,
        second_epoch=True,
    )
    return [ours, *trl_jobs(ours, options)]


def trl_jobs(ours: Job, options: argparse.Namespace) -> list[Job]:
    batches = [batch for batch in options.trl_batches if ours.pairs_per_step % batch == 0]
    theirs = replace(ours, engine="trl", second_epoch=False)
    return [replace(theirs, pairs_per_forward=batch) for batch in batches]


def run_in_turn(name: str, asked: Sequence[Job], repeats: int) -> list[dict[str, Any]]:
    """Every job in a fresh process, one after another, `repeats` times over; one summary a job."""
    measured: list[list[dict[str, Any]]] = [[] for _ in asked]
    for _ in range(repeats):
        for n, job in enumerate(asked):
            print(f"{name}: {label(job)} …", flush=True)
            measured[n].append(in_fresh_process(job))
    bases = {result["base"] for results in measured for result in results}
    assert len(bases) == 1, f"the engines trained on different bases: {bases}"
    summaries = [summary(name, label(job), found) for job, found in zip(asked, measured, strict=True)]
    second = [found["second_epoch"] for found in measured[0]]
    if second[0] is not None:
        again = [{**found, **epoch} for found, epoch in zip(measured[0], second, strict=True)]
        summaries.insert(1, summary(name, "lora_dpo, cached", again))
    return summaries


def label(job: Job) -> str:
    return "lora_dpo" if job.engine == "lora_dpo" else f"TRL, {job.pairs_per_forward} a forward"


def summary(name: str, engine: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [second for run in runs for second in run["seconds"]]
    total = sum(seconds)

    def rate(what: str) -> float:
        return sum(run[what] for run in runs) / total

    return {
        "row": name,
        "engine": engine,
        "s/step": statistics.median(seconds),
        "pairs/s": rate("pairs"),
        "tokens/s": rate("distinct_tokens"),
        "computed/s": rate("processed_tokens"),
        "peak GiB": statistics.median(run["peak_bytes"] for run in runs) / 2**30,
        "runs": list(runs),
    }


def report(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """What was compared, the table, and TRL over lora_dpo."""
    job = results[0]["runs"][0]["job"]
    checkpointing = "on" if job["checkpointing"] else "off"
    print(
        f"\n{job['compute_dtype']}, gradient checkpointing {checkpointing} in both,"
        f" {results[0]['runs'][0]['threads']} threads, {job['tokens_per_microbatch']} tokens a micro-batch of"
        f" lora_dpo's,\n{job['warmup']} step to warm up, {job['steps']} timed, repeats: {options.repeats}"
    )
    print_table([{name: value for name, value in line.items() if name != "runs"} for line in results])
    print("\nTRL over lora_dpo; above 1 lora_dpo is faster, or smaller:")
    print_table([ratios([line for line in results if line["row"] == name]) for name in in_order(results)])


def in_order(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["row"] for line in results))


def ratios(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ours = next(line for line in lines if line["engine"] == "lora_dpo")
    cached = next((line for line in lines if line["engine"] == "lora_dpo, cached"), None)
    theirs = [line for line in lines if line["engine"].startswith("TRL")]
    fastest = min(theirs, key=lambda line: line["s/step"])
    leanest = min(theirs, key=lambda line: line["peak GiB"])
    return {
        "row": ours["row"],
        "fastest TRL": fastest["engine"],
        "time": fastest["s/step"] / ours["s/step"],
        "time, cached": fastest["s/step"] / cached["s/step"] if cached else "-",
        "first epoch / cached": against_cached(cached) if cached else "-",
        "memory": fastest["peak GiB"] / ours["peak GiB"],
        "memory, leanest TRL": leanest["peak GiB"] / ours["peak GiB"],
    }


def against_cached(cached: dict[str, Any]) -> float:
    """Seconds of a step that computes the reference over those of the same step, run next, that reads it."""
    pairs = [
        first / second
        for run in cached["runs"]
        for first, second in zip(run["seconds_without_cache"], run["seconds"], strict=True)
    ]
    return statistics.median(pairs)


def agree(options: argparse.Namespace) -> dict[str, Any]:
    """Both engines' losses over the first steps, in float32, from the same adapter in the same order."""
    row = chosen_rows(options)[0]
    with tempfile.TemporaryDirectory() as folder:
        ours, *theirs = jobs(row, checkpoint(row, Path(folder)), options)
        asked = [
            replace(
                job,
                compute_dtype="float32",
                warmup=0,
                steps=options.steps or 10,
                learning_rate=options.learning_rate or 5e-4,
                second_epoch=False,
            )
            for job in (ours, theirs[0])
        ]
        results = [in_fresh_process(job) for job in asked]
    assert results[0]["base"] == results[1]["base"], "the engines trained on different bases"
    lines = [
        {"step": str(n + 1), "lora_dpo": f"{a:.7f}", "TRL": f"{b:.7f}", "difference": f"{abs(a - b):.1e}"}
        for n, (a, b) in enumerate(zip(results[0]["losses"], results[1]["losses"], strict=True))
    ]
    largest = max(abs(a - b) for a, b in zip(results[0]["losses"], results[1]["losses"], strict=True))
    print(f"\n{row.name}, float32, learning rate {asked[0].learning_rate:g}, {label(asked[1])}")
    print_table(lines)
    verdict = "within" if largest <= BAR else "NOT within"
    print(f"\nlargest difference {largest:.1e}: {verdict} {BAR:.0e}")
    return {"largest_difference": largest, "bar": BAR, "runs": results}


def compare_on_cuda(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The 8B shape, quantized in memory; synthetic pairs of 256 + 2 × 384 tokens, 4 a step."""
    ours = Job(
        engine="lora_dpo",
        cuda=True,
        steps=options.steps or 5,
        checkpointing=options.checkpointing,
        tokens_per_microbatch=options.tokens_per_microbatch,
        cuda_memory_gb=max(options.cuda_memory, default=0.0),
        second_epoch=True,
    )
    results = run_in_turn("8B synthetic", [ours, *trl_jobs(ours, options)], options.repeats)
    report(results, options)
    return results


def search(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The longest prompt + response that each engine trains on cards of these sizes, one pair a step.

    The emulated memory is what torch may allocate; CUDA's own context (some 0.5 GB) comes on top.
    """
    results = []
    for memory in options.cuda_memory or [0.0]:
        ours = Job(
            engine="lora_dpo",
            cuda=True,
            cuda_memory_gb=memory,
            search=options.search,
            checkpointing=options.checkpointing,
            tokens_per_microbatch=options.tokens_per_microbatch,
            pairs_per_step=1,
        )
        longest = {
            job.engine: in_fresh_process(job)["longest"] for job in (ours, replace(ours, engine="trl"))
        }
        results.append({"GB": memory or "all", **longest})
    print("\nlongest side (prompt and response, half each) of which two steps of one pair fit; 0: none")
    print_table(results)
    return results


if __name__ == "__main__":
    main()
