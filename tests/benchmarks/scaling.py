"""How lora_dpo's step scales: time with tokens, memory with the micro-batch, the step and the vocabulary.

    python tests/benchmarks/scaling.py [--only time microbatch pairs vocabulary]

A 40M random Llama (NF4, LoRA of rank 16 on all linear layers, bfloat16, no gradient checkpointing unless
asked), pairs of random tokens, all of one size (prompt 256, two responses of 384: 1,024 distinct tokens), so
that nothing but what is varied varies. Every value is the median of --processes fresh processes.

time: seconds a step against its distinct tokens, at one budget; the time per token should stay level.
microbatch: memory against tokens_per_microbatch, with the pairs of a step fixed.
pairs: memory against the pairs of a step, at one budget; the bar is flat within 5%.
vocabulary: time and memory against the vocabulary, at one budget.

Columns: `s/step` median over the timed steps; `tokens/s` distinct tokens; `peak MiB` the most anonymous
memory above what was in use just before the first step, with the model loaded (CUDA: torch's allocator); the
last two compare the row with the first one: seconds a token, and memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import Job, in_fresh_process
from measuring import conditions, print_conditions, print_table, write_json
from workload import base_tokenizer, save_random_base, small_shape

PARTS = ("time", "microbatch", "pairs", "vocabulary")
FLAT = 0.05
"""How far memory may move over the pairs of a step."""


def main() -> None:
    options = parse()
    found = conditions()
    print_conditions(found)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            results[part] = [
                measured(part, value, job, options) for value, job in cases(part, Path(folder), options)
            ]
    for part, rows in results.items():
        report(part, rows)
    write_json(options.json, {"conditions": found, "results": results})


def parse() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=int, default=2048, help="tokens_per_microbatch where it is fixed")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step where they are fixed")
    parser.add_argument("--step-pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="time, pairs")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="microbatch")
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[16384, 32768, 65536, 131072], help="vocabulary"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=384, help="tokens of each of the two")
    parser.add_argument("--steps", type=int, default=3, help="timed, after 1 to warm up")
    parser.add_argument("--processes", type=int, default=3, help="fresh ones, of which the median is taken")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: its own choice")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    return parser.parse_args()


def cases(part: str, folder: Path, options: argparse.Namespace) -> Iterator[tuple[int, Job]]:
    """(the value that is varied, its job) of one part."""
    job = Job(
        engine="lora_dpo",
        prompt_tokens=options.prompt,
        response_tokens=options.response,
        pairs_per_step=options.pairs,
        tokens_per_microbatch=options.budget,
        steps=options.steps,
        checkpointing=options.checkpointing,
        threads=options.threads,
        cuda=options.cuda,
    )
    if part == "vocabulary":
        for size in options.vocabularies:
            yield size, replace(job, base=checkpoint(folder, size))
        return
    job = replace(job, base=checkpoint(folder))
    if part == "microbatch":
        for budget in options.budgets:
            yield budget, replace(job, tokens_per_microbatch=budget)
        return
    for pairs in options.step_pairs:
        yield pairs, replace(job, pairs_per_step=pairs)


def checkpoint(folder: Path, vocabulary: int = 16384) -> str:
    base = folder / str(vocabulary)
    if not base.exists():
        save_random_base(small_shape(vocabulary), base, base_tokenizer())
    return str(base)


def measured(part: str, value: int, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{part}: {value:,} …", flush=True)
    runs = [in_fresh_process(job) for _ in range(options.processes)]
    return {
        part: value,
        "s/step": statistics.median(second for run in runs for second in run["seconds"]),
        "tokens a step": runs[0]["distinct_tokens"] // job.steps,
        "tokens/s": statistics.median(run["distinct_tokens"] / sum(run["seconds"]) for run in runs),
        "peak MiB": statistics.median(run["peak_bytes"] for run in runs) / 2**20,
        "runs": runs,
    }


def report(part: str, rows: list[dict[str, Any]]) -> None:
    """A part's table, with each row against the first one; memory over the pairs against its bar."""
    job, first = rows[0]["runs"][0]["job"], rows[0]
    lines = []
    for row in rows:
        line = {("pairs a step" if part in ("time", "pairs") else part): row[part]}
        line |= {name: row[name] for name in ("tokens a step", "s/step", "tokens/s", "peak MiB")}
        line["time per token, against first"] = first["tokens/s"] / row["tokens/s"]
        line["memory, against first"] = row["peak MiB"] / first["peak MiB"]
        lines.append(line)
    fixed = "" if part == "microbatch" else f", {job['tokens_per_microbatch']} tokens a micro-batch"
    checkpointing = "on" if job["checkpointing"] else "off"
    threads = rows[0]["runs"][0]["threads"]
    print(
        f"\n{part}: {job['compute_dtype']}, {threads} threads, checkpointing {checkpointing}{fixed},"
        f" {len(first['runs'])} processes each"
    )
    print_table(lines)
    if part == "pairs":
        sizes = [row["peak MiB"] for row in rows]
        spread = max(abs(size / sizes[0] - 1) for size in sizes)
        verdict = "within" if spread <= FLAT else "NOT within"
        print(f"memory moves by at most {spread:.1%} from the first: {verdict} {FLAT:.0%}")


if __name__ == "__main__":
    main()
