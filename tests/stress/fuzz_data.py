"""Thousands of bad data files and rows: each is accepted whole or refused with file and row.

    python tests/stress/fuzz_data.py --examples 10000 --seed 0

Every example is loaded as pairs, demonstrations or ratings, as chat or as text, once with on_bad_row=stop and
once with skip; what is accepted is compared with a plain reader's rows, and a share of it is tokenized. The
table that is printed last must have nothing but zeros under tracebacks, hangs and silent edits; the exit
status is 1 otherwise, and --report has what happened. The same seed gives the same examples.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hypothesis  # noqa: E402
from builders import small_tokenizer  # noqa: E402
from hostile_files import FORMATS, PLACES, Case, check, files, in_memory, saved  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lora_dpo.tokenization import ChatTokenizer  # noqa: E402

KINDS = [*FORMATS, *(f"{ending}.gz" for ending in FORMATS), "memory", "saved"]
HEADINGS = ("examples", "accepted", "refused", "traceback", "hang", "silent edit")


def strategy(kind: str) -> st.SearchStrategy[Case]:
    if kind in ("memory", "saved"):
        return in_memory() if kind == "memory" else saved()
    return files(kind.removesuffix(".gz"), kind.endswith(".gz"), large=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000, help="how many in all (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--seconds", type=float, default=20.0, help="an example may take this (default: 20)")
    parser.add_argument("--tokenize", type=float, default=0.5, help="share that is tokenized (default: 0.5)")
    parser.add_argument("--only", choices=[*KINDS, "places"], help="one kind alone")
    parser.add_argument("--report", type=Path, default=Path("fuzz_data.txt"), help="for what went wrong")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    counts: dict[str, Counter[str]] = {}
    seconds: dict[str, float] = {}
    options.report.write_text("")
    tokenizer = ChatTokenizer(small_tokenizer(), max_tokens=256)
    kinds = [options.only] if options.only else [*KINDS, "places"]
    share = -(-options.examples // len([kind for kind in kinds if kind != "places"] or [1]))
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            counts[kind], began = Counter(), time.monotonic()

            def one(case: Case, load: int, text: bool, dice: float, kind: str = kind) -> None:
                chosen = tokenizer if dice < options.tokenize else None
                verdict = check(case, load, text, Path(folder) / "data", chosen, options.seconds)
                counts[kind].update(
                    ["examples", "accepted" if verdict.accepted else "refused", verdict.problem]
                )
                if verdict.problem:
                    with options.report.open("a", encoding="utf-8", errors="backslashreplace") as report:
                        what = case.odd or (case.content or repr_of(case.rows))[:2000]
                        heading = f"=== {kind} {verdict.problem}: load {load}, text {text}, {case.note}"
                        report.write(f"{heading}\n{what!r}\n{verdict.detail}\n")

            if kind == "places":
                for name in PLACES:
                    for load in range(3):
                        one(Case("places", odd=name), load, load == 2, 0.0)
            else:
                run(kind, one, share, options.seed + number)
            seconds[kind] = time.monotonic() - began
            print(f"{kind}: {dict(counts[kind])}, {seconds[kind]:.0f} s", flush=True)
    return report_table(counts, seconds)


def repr_of(rows: object) -> str:
    try:
        return repr(rows)
    except Exception:
        return "rows without a repr"


def run(kind: str, one, examples: int, seed: int) -> None:
    """`one` with `examples` draws from the seed; it raises nothing, so that all of them are run."""
    draws = st.tuples(strategy(kind), st.integers(0, 2), st.booleans(), st.floats(0, 1))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
        print_blob=False,
    )
    @hypothesis.given(draws)
    def body(drawn) -> None:
        one(*drawn)

    body()


def report_table(counts: dict[str, Counter[str]], seconds: dict[str, float]) -> int:
    print(f"\n{'':12}" + "".join(f"{heading:>13}" for heading in (*HEADINGS, "seconds")))
    total = sum(counts.values(), Counter())
    for kind, found in [*counts.items(), ("all", total)]:
        taken = seconds.get(kind, sum(seconds.values()))
        print(f"{kind:12}" + "".join(f"{found[h]:13,}" for h in HEADINGS) + f"{taken:13.0f}")
    return int(any(total[heading] for heading in HEADINGS[3:]))


if __name__ == "__main__":
    sys.exit(main())
