"""Kill exports with SIGKILL at random moments, and call them again until they end.

    python tests/stress/export_kills.py --kills 100 --seed 0

A merged model in a dozen shards, an adapter. After every kill there is either nothing at the destination, or
the whole of it. At the end every file is what the export writes that nobody killed, to the byte (but the
report's and the card's, which say what was measured), and nothing half-written is left. Exit status 1 if
anything is otherwise. A second or two a kill.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nursery import Nursery
from tiny_runs import TinyRun, Workshop

KINDS: dict[str, list[str]] = {
    "merged": ["--to", "merged", "--shard-size", "30KB", "--examples", "2"],
    "adapter": ["--to", "adapter"],
}
MOST_KILLS = 4
"""Of one export; then it may end."""


@dataclass
class Tally:
    exports: int = 0
    kills: int = 0
    where: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file by name; of those that tell of measurements only the name."""
    telling = ("export_report.json", "README.md")
    return {f.name: b"" if f.name in telling else f.read_bytes() for f in sorted(folder.iterdir())}


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0


def kill_exports(
    shop: Workshop, kills: int, seed: int, say: Callable[[str], object] = lambda line: None
) -> Tally:
    rng, tally = random.Random(seed), Tally()
    run = shop.begin("plain", f"exported-{seed}")
    if run.go().wait() != 0:
        raise RuntimeError("the run did not end")
    whole, seconds = {}, {}
    for kind, words in KINDS.items():
        began = time.monotonic()
        child = run.run("export", run.directory.path, *words, "--output", run.disk / f"whole-{kind}")
        if child.wait() != 0:
            raise RuntimeError(f"the export that nobody killed: {child.stderr}")
        seconds[kind] = time.monotonic() - began
        whole[kind] = files_of(run.disk / f"whole-{kind}")
    while tally.kills < kills:
        kind = "adapter" if tally.exports % 8 == 7 else "merged"
        out = run.disk / f"out-{tally.exports}"
        one_export(run, KINDS[kind], out, whole[kind], (rng, seconds[kind], tally))
        tally.exports += 1
        say(f"export {tally.exports}: {tally.kills} kills, {dict(tally.where)}")
    return tally


def one_export(
    run: TinyRun,
    words: list[str],
    out: Path,
    whole: dict[str, bytes],
    how: tuple[random.Random, float, Tally],
) -> None:
    """Killed several times, then left alone. how: chance, seconds that the export takes, what is counted."""
    rng, seconds, tally = how
    for attempt in range(MOST_KILLS + 1):
        child = run.run("export", run.directory.path, *words, "--output", out)
        part = out.with_name(f".{out.name}.part")
        if attempt < MOST_KILLS:
            # Half of them as soon as so many shards are there: a small model is merged in a moment.
            until, shards = time.monotonic() + rng.uniform(0, 1.1 * seconds), rng.randint(1, 9)
            by_shards = "merged" in words and rng.random() < 0.5
            while child.poll() is None and (
                shards_in(part) < shards if by_shards else time.monotonic() < until
            ):
                time.sleep(0.0002)
        if attempt < MOST_KILLS and child.poll() is None:
            child.signal(signal.SIGKILL)
            child.wait()
            tally.kills += 1
            tally.where["before it wrote" if not part.is_dir() else f"{shards_in(part):>2} shards"] += 1
            if out.exists() and files_of(out) != whole:
                tally.failures.append(f"{out.name}: half of it was at the destination after a kill")
            if not out.exists():
                continue
        elif child.wait() != 0:
            tally.failures.append(f"{out.name}: the repeat ended with {child.status}: {child.stderr}")
        break
    if not out.exists() or files_of(out) != whole:
        tally.failures.append(f"{out.name} is not what the export writes that nobody killed")
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    tally.failures += [f"{name} was left" for name in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        tally = kill_exports(Workshop(Path(folder), nursery), options.kills, options.seed, print)
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    print(
        f"{tally.kills} kills of {tally.exports} exports, {len(tally.failures)} failures,"
        f" {time.monotonic() - began:.0f} s; at the kill: {dict(sorted(tally.where.items()))}"
    )
    raise SystemExit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
