"""Kill runs with SIGKILL at random moments, half of them inside a save or a rotation, and let them go on.

    python tests/stress/kills.py --kills 200 --seed 0

Whole runs are killed: loading, tokenizing, preflight, steps, evaluations, saves, the deletion of old
checkpoints, the writing of adapter/. After every kill the newest whole checkpoint must be no older than the
newest one that had been completed. At the end adapter and metrics must be the uninterrupted run's, bit for
bit, and nothing half-written may be left. Exit status 1 if anything is otherwise. About a second a kill.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nursery import Child, Nursery
from tiny_runs import VARIANTS, Ended, TinyRun, Workshop

WHERE = {0: "elsewhere", 1: "save", 2: "rotation", 3: "adapter/"}


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    identical: int = 0
    most_lost: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    @property
    def inside(self) -> int:
        return self.kills["save"] + self.kills["rotation"]


def kill_runs(
    shop: Workshop,
    kills: int,
    seed: int,
    *,
    names: Sequence[str] = tuple(VARIANTS),
    say: Callable[[str], object] = lambda line: None,
) -> Tally:
    """Runs are killed until there were so many, and as many as half of them inside."""
    rng, tally = random.Random(seed), Tally()
    while tally.total < kills or tally.inside < kills // 2:
        variant = names[tally.runs % len(names)]
        run = shop.begin(variant, f"killed-{tally.runs}")
        before = len(tally.failures)
        try:
            one_run(run, variant, rng, tally)
        except (TimeoutError, RuntimeError, OSError) as error:
            tally.failures.append(f"run {tally.runs} ({variant}): {error}")
        tally.runs += 1
        for failure in tally.failures[before:]:
            say(failure)
        say(f"run {tally.runs} ({variant}): {tally.total} kills, {dict(tally.kills)}")
    return tally


def one_run(run: TinyRun, variant: str, rng: random.Random, tally: Tally) -> None:
    """One run, killed up to five times, then let go on to its end."""
    whole = run.workshop.whole(variant)
    child = None
    for _ in range(rng.randint(3, 5)):
        saved = run.newest_whole()
        child = run.go()
        inside = 2 * tally.inside <= tally.total
        if not kill_somewhere(child, whole, rng, resumed=saved > 0, inside=inside):
            if child.wait() != 0:
                raise RuntimeError(f"ended with {child.status}\n{child.stderr}")
            break
        tally.kills[WHERE[child.flags["inside"]]] += 1
        completed, newest = max(saved, child.flags["saved"]), run.newest_whole()
        if newest < completed:
            raise RuntimeError(f"step {completed} was saved, and after a kill step {newest} is the newest")
        lost = run.last_step() - newest
        if lost > run.recipe.training.save_every:
            raise RuntimeError(f"a kill lost {lost} steps")
        tally.most_lost = max(tally.most_lost, lost)
    if child is None or child.status != 0:
        child = run.go()
    if child.wait() != 0:
        raise RuntimeError(f"resumed, it ended with {child.status}\n{child.stderr}")
    wrong = run.faults(whole)
    tally.failures += [f"{run.folder.name} ({variant}): {fault}" for fault in wrong]
    tally.identical += not wrong


def kill_somewhere(child: Child, whole: Ended, rng: random.Random, *, resumed: bool, inside: bool) -> bool:
    """Whether it died of it; not where it had ended before. whole: how long things take."""
    typical = whole.flags
    if inside:
        # Half of what is inside lies in rotations, where the run has them.
        kind, spent, times = rng.choice(
            [(1, "save_us", "saves"), (2, "rotation_us", "rotations")]
            if typical["rotations"]
            else [(1, "save_us", "saves")]
        )
        wanted = 1 if resumed else rng.randint(1, min(3, typical[times]))
        seen = entered = 0

        def there(flags) -> bool:
            nonlocal seen, entered
            if flags["inside"] == kind and flags["entered"] != entered:
                entered, seen = flags["entered"], seen + 1
            return seen >= wanted and flags["inside"] == kind

        if child.reaches(there):
            pause = rng.uniform(0, typical[spent] / max(1, typical[times])) / 1e6
            until = time.perf_counter() + pause
            while time.perf_counter() < until:
                pass
    else:
        until = time.monotonic() + rng.uniform(0, 1.3) * whole.seconds
        while time.monotonic() < until and child.poll() is None:
            time.sleep(0.003)
    child.signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def table(tally: Tally) -> str:
    rows = [
        ("kills", tally.total),
        ("  inside a save", tally.kills["save"]),
        ("  inside a rotation", tally.kills["rotation"]),
        ("  while adapter/ was written", tally.kills["adapter/"]),
        ("  elsewhere", tally.kills["elsewhere"]),
        ("runs", tally.runs),
        ("  identical to the uninterrupted run", tally.identical),
        ("most steps lost by a kill", tally.most_lost),
        ("failures", len(tally.failures)),
    ]
    return "\n".join(f"{name:<40} {value:>6}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        shop = Workshop(Path(folder) / "shop", nursery)
        for variant in VARIANTS:
            shop.whole(variant)
        began = time.monotonic()
        tally = kill_runs(shop, given.kills, given.seed, say=lambda line: print(line, flush=True))
        print(f"\n{table(tally)}\n{'seconds':<40} {time.monotonic() - began:>6.0f}")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
