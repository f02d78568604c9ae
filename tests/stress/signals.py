"""SIGTERM and SIGINT in every phase of a run: at most one step lost, and a line that says how to go on.

    python tests/stress/signals.py

A child waits inside the phase until the signal was sent, and only then may go on. It must end with 143 or
130, one line on stderr and no traceback, leave no process behind and at most one step without a checkpoint;
going on must end as the uninterrupted run does. Then a second signal, tokenizing with workers, and the
export commands. Exit status 1 if anything is otherwise. About two minutes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nursery import Child, Nursery
from tiny_runs import TinyRun, Workshop

RARELY = "training.save_every=100"
OFTEN = "training.save_every=2"
SECONDS_TO_END = 20.0


@dataclass(frozen=True)
class Case:
    """Where a signal arrives. after: the steps that are done by then. changes: of the recipe."""

    name: str
    phase: str
    after: int = 0
    changes: tuple[str, ...] = (RARELY,)


CASES = [
    Case("load", "load"),
    Case("tokenise", "tokenise"),
    Case("reference", "reference", after=2),
    Case("forward", "forward", after=2),
    Case("backward", "backward", after=2),
    Case("optimizer step", "optimizer step", after=2),
    Case("evaluation", "evaluation", after=2),
    Case("save", "save", after=2, changes=(OFTEN,)),
    Case("export", "export"),
]
"""One for each of the nine phases."""

MORE = [
    Case("reference, in preflight", "reference"),
    Case("backward, in preflight", "backward"),
    Case("evaluation, the last", "evaluation", after=6),
    Case("save, the first", "save", changes=(OFTEN,)),
    Case("save, the last", "save", after=6),
    Case("optimizer step, the last", "optimizer step", after=5),
    Case("tokenise, with workers", "tokenise", changes=(RARELY, "data.workers=2")),
]


def interrupted(run: TinyRun, case: Case, numbers: list[int], *, let_go: bool = True) -> Child:
    """The run's process, after signals arrived in that phase. Raises TimeoutError where it stays."""
    child = run.go(pause=case.phase, after=case.after)
    if not child.reaches(lambda flags: flags["paused"] == 1):
        raise RuntimeError(f"never came to {case.name}\n{child.stderr}")
    for place, number in enumerate(numbers):
        child.signal(number)
        # Two of a kind that nobody heard in between are one.
        until = time.monotonic() + (SECONDS_TO_END if place + 1 < len(numbers) else 0.02)
        while time.monotonic() < until and "once more" not in child.stdout and child.poll() is None:
            time.sleep(0.005)
    child.flags["go"] = let_go
    child.wait(SECONDS_TO_END)
    return child


def told(child: Child, number: int) -> list[str]:
    """What is wrong with how a process ended that a signal told to."""
    lines = child.stderr.strip().splitlines()
    wrong = [] if child.status == 128 + number else [f"exit status {child.status}"]
    if len(lines) != 1 or "Traceback" in child.stderr:
        wrong.append(f"stderr is {child.stderr!r}")
    elif "--resume" not in lines[0] and "same command" not in lines[0]:
        wrong.append(f"no word on how to go on: {lines[0]}")
    time.sleep(0.05)
    return wrong + [f"process {pid} lives on" for pid in child.others()]


def faults(shop: Workshop, case: Case, number: int, *, twice: bool = False) -> tuple[int, list[str]]:
    """(steps lost, what is wrong) of a run that was stopped so, and went on."""
    name = f"{case.name}-{number}{'-twice' if twice else ''}".replace(" ", "-").replace(",", "")
    run = shop.begin("plain", name, *case.changes)
    child = interrupted(run, case, [number] * (2 if twice else 1), let_go=not twice)
    wrong = told(child, number)
    lost = run.last_step() - run.newest_whole()
    if lost > 1 and not twice:
        wrong.append(f"{lost} steps lost")
    again = run.go()
    if again.wait() != 0:
        return lost, [*wrong, f"did not go on: {again.stderr}"]
    return lost, wrong + run.faults(shop.whole("plain", *case.changes))


def export_faults(shop: Workshop, kind: str, number: int) -> list[str]:
    """What is wrong after `export` was stopped while it wrote, and called again."""
    run = shop.begin("plain", f"export-{kind}-{number}")
    if run.go().wait() != 0:
        raise RuntimeError("the run did not end")
    words = ["export", run.directory.path, "--to", kind]
    child = run.run(*words, pause="export")
    if not child.reaches(lambda flags: flags["paused"] == 1):
        raise RuntimeError(f"never came to the export\n{child.stderr}")
    child.signal(number)
    time.sleep(0.02)
    child.flags["go"] = 1
    child.wait(SECONDS_TO_END)
    wrong = told(child, number)
    left = [p.name for p in run.directory.path.iterdir() if "export" in p.name]
    # What was merged so far waits in a hidden folder, and the second export takes it over.
    wrong += [f"{name} was left" for name in left if kind == "adapter" or not name.startswith(".")]
    again = run.run(*words)
    if again.wait() != 0:
        wrong.append(f"the second export: {again.stderr}")
    return wrong + [f"{left} was left" for left in run.litter()]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    failures: list[str] = []
    rows: list[str] = []
    began, most = time.monotonic(), 0

    def note(name: str, number: int, lost: int, wrong: list[str]) -> None:
        row = f"{name:<32} {signal.Signals(number).name:<8} {lost:>10}  {'; '.join(wrong) or 'as it should'}"
        print(row, flush=True)
        rows.append(row)
        failures.extend(wrong)

    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        shop = Workshop(Path(folder) / "shop", nursery)
        for number in (signal.SIGTERM, signal.SIGINT):
            for case in [*CASES, *MORE]:
                lost, wrong = attempt(lambda c=case, n=number: faults(shop, c, n))
                most = max(most, lost)
                note(case.name, number, lost, wrong)
            for case in CASES[2:]:
                if case.phase != "evaluation":  # the first ends that
                    lost, wrong = attempt(lambda c=case, n=number: faults(shop, c, n, twice=True))
                    note(f"{case.name}, twice", number, lost, wrong)
            for kind in ("adapter", "merged"):
                _, wrong = attempt(lambda k=kind, n=number: (0, export_faults(shop, k, n)))
                note(f"export --to {kind}", number, 0, wrong)
    print(f"\n{'phase':<32} {'signal':<8} {'steps lost':>10}\n" + "\n".join(rows))
    print(f"\n{len(rows)} stops, at most {most} steps lost by one signal, {len(failures)} failures")
    print(f"{time.monotonic() - began:.0f} seconds")
    sys.exit(bool(failures))


def attempt(work) -> tuple[int, list[str]]:
    try:
        return work()
    except (RuntimeError, TimeoutError, OSError) as error:
        return 0, [f"{type(error).__name__}: {error}"]


if __name__ == "__main__":
    main()
