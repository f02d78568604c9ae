"""A disk that fails at every operation of a run, one after another: what was there before stays whole.

    python tests/stress/full_disk.py                     # ENOSPC at each operation, and a tmpfs of each size
    python tests/stress/full_disk.py --error EIO         # that one operation fails, the next do not
    python tests/stress/full_disk.py --error KILL        # the process dies there
    python tests/stress/full_disk.py --every 10          # a tenth of it

The run's folder and its caches lie on the failing disk: the n-th write, fsync, rename, mkdir, truncation or
creation below it fails, for n = 1, 2, 3, … until the run comes through. (Free space is not looked at first:
the failure must be met by what writes.) Each run must end with status 2, one line and no traceback, or do
without what it can (a cache) and end with status 0; every checkpoint must verify, recipe.yaml and
metrics.jsonl must be readable; and once there is room it must go on to the uninterrupted run's adapter. The
same for `export` and `eval`. Needs Linux and a C compiler; the tmpfs needs user namespaces. Exit status 1 if
anything is otherwise.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from failing import KILLED, compiled
from nursery import Child, Nursery
from tiny_runs import TinyRun, Workshop

from lora_dpo.errors import UserError
from lora_dpo.recipe import load_recipe
from lora_dpo.run_directory import damage

VARIANT, CHANGES = "plain", ("training.max_steps=3",)
INSIDE = "LORA_DPO_STRESS_TMPFS"
SIZES = [*range(16, 512, 16), *range(512, 2048, 64)]
"""Of the tmpfs, in KiB."""


def operations(run: TinyRun, *words: object) -> int:
    """How many there are without a failure; the words, or the run, are then done."""
    counting = {"below": str(run.disk), "at": 0}
    child = run.run(*words, fail=counting) if words else run.go(fail=counting)
    if child.wait() != 0:
        raise RuntimeError(child.stderr)
    return child.flags["operations"]


def starved(run: TinyRun, at: int, error: int, words: Sequence[object] = ()) -> Child:
    """The process whose `at`-th operation fails; later ones too where the disk is full."""
    fail = {"below": str(run.disk), "at": at, "error": error, "stays": error == errno.ENOSPC}
    named: dict[str, Any] = {"fail": fail, "blind": True}
    child = run.run(*words, **named) if words else run.go(**named)
    child.wait()
    return child


def told(child: Child, error: int) -> list[str]:
    """What is wrong with how it ended."""
    if error == KILLED:
        return [] if child.status in (0, -9) else [f"exit status {child.status}: {child.stderr}"]
    lines = child.stderr.strip().splitlines()
    if "Traceback" in child.stderr or (child.status == 2 and len(lines) != 1):
        return [f"exit status {child.status}, stderr: {child.stderr.strip()[-1500:]}"]
    return [] if child.status in (0, 2) else [f"exit status {child.status}: {child.stderr}"]


def harmed(run: TinyRun, before: int, child: Child) -> list[str]:
    """What of the run can't be read any more. before: the step of its newest whole checkpoint then."""
    wrong = []
    for folder in run.directory.checkpoints():
        if reason := damage(folder):
            wrong.append(f"{folder.name}: {reason}")
    if run.newest_whole() < max(before, child.flags["saved"]):
        wrong.append(
            f"step {max(before, child.flags['saved'])} was saved, and {run.newest_whole()} is the newest"
        )
    if run.directory.recipe_file.exists():
        try:
            load_recipe(run.directory.recipe_file)
        except UserError as error:
            wrong.append(str(error))
    lost: list[int] = []
    list(run.directory.records(lost.append))
    if lost and child.status != -9:  # a kill may cut the last line
        wrong.append(f"metrics.jsonl can't be read in line {lost[0]}")
    return wrong


def run_faults(shop: Workshop, name: str, at: int, error: int) -> tuple[str, list[str]]:
    """(how it ended, what is wrong) of a run that met a failure at this operation."""
    run = shop.begin(VARIANT, name, *CHANGES)
    child = starved(run, at, error)
    wrong = told(child, error) + harmed(run, 0, child)
    again = run.go()
    if again.wait() != 0:
        return how(child), [*wrong, f"with room again: {again.stderr.strip()}"]
    return how(child), wrong + run.faults(shop.whole(VARIANT, *CHANGES))


def how(child: Child) -> str:
    if child.status == 0:
        return "did without"
    return "killed" if child.status == -9 else "refused in a line" if child.status == 2 else "otherwise"


def command_faults(run: TinyRun, at: int, error: int, words: list[object]) -> tuple[str, list[str]]:
    """The same of `export` or `eval` on a finished run. The destination must not be half there."""
    child = starved(run, at, error, words)
    wrong = told(child, error) + harmed(run, 0, child)
    made = [p for p in run.directory.path.iterdir() if p.name.startswith("export-")]
    if child.status == 2 and any(
        not (p / "export_report.json").exists() and not whole_model(p) for p in made
    ):
        wrong.append(f"{made[0].name} is half there")
    for path in made:
        shutil.rmtree(path)
    again = run.run(*words)
    if again.wait() != 0:
        wrong.append(f"with room again: {again.stderr.strip()}")
    for path in run.directory.path.glob("export-*"):
        shutil.rmtree(path)
    wrong += [f"{left} was left" for left in run.litter()]
    return how(child), wrong


def whole_model(folder: Path) -> bool:
    """A merged model that appeared, before it was compared with what it was made of."""
    return {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def every_operation(shop: Workshop, error: int, every: int, rows: list[str], failures: list[str]) -> None:
    count = operations(shop.begin(VARIANT, "counted", *CHANGES))
    tell("a run", shop, error, range(1, count + 1, every), count, rows, failures)
    finished = shop.begin(VARIANT, "finished", *CHANGES)
    if finished.go().wait() != 0:
        raise RuntimeError("the run did not end")
    for words in COMMANDS:
        given = [words[0], finished.directory.path, *words[1:]]
        count = operations(finished, *given)
        for path in finished.directory.path.glob("export-*"):
            shutil.rmtree(path)
        tell(" ".join(words), shop, error, range(1, count + 1, every), count, rows, failures, finished, given)


COMMANDS: list[list[str]] = [
    ["export", "--to", "adapter"],
    ["export", "--to", "merged"],
    ["eval", "--samples", "2", "--max-new-tokens", "4"],
]


def tell(
    what: str,
    shop: Workshop,
    error: int,
    places: range,
    count: int,
    rows: list[str],
    failures: list[str],
    finished: TinyRun | None = None,
    words: list[object] | None = None,
) -> None:
    """Fail in each of these places, and add a row to the table."""
    ends: Counter[str] = Counter()
    bad = 0
    for at in places:
        try:
            if finished is not None and words is not None:
                end, wrong = command_faults(finished, at, error, words)
            else:
                end, wrong = run_faults(shop, f"failing-{at}", at, error)
                shutil.rmtree(shop.folder / f"failing-{at}")
        except (TimeoutError, RuntimeError, OSError) as trouble:
            end, wrong = "otherwise", [str(trouble)]
        ends[end] += 1
        bad += bool(wrong)
        for line in wrong:
            failures.append(f"{what}, operation {at}: {line}")
            print(failures[-1], flush=True)
    detail = ", ".join(f"{end} {times}" for end, times in sorted(ends.items()))
    rows.append(f"{what:<44} {count:>10} {len(places):>7} {bad:>8}  {detail}")
    print(rows[-1], flush=True)


def real_disk(every: int) -> int:
    """Runs on small file systems; in a namespace of its own, where this user may mount. The exit status."""
    words = ["unshare", "-Urm", sys.executable, __file__, "--every", str(every)]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        print("a real small disk: left out, this system has no user namespaces")
        return 0
    return subprocess.run(words, env=os.environ | {INSIDE: "1"}, check=False).returncode


def small_disks(every: int) -> int:
    """Inside the namespace: a tmpfs of every size until a run fits. The exit status."""
    rows: list[str] = []
    failures: list[str] = []
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        shop = Workshop(Path(folder) / "shop", nursery)
        shop.whole(VARIANT, *CHANGES)
        sizes = SIZES[::every]
        for size in sizes:
            run = shop.begin(VARIANT, f"tmpfs-{size}", *CHANGES)
            mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", run.disk)
            try:
                child = run.go(blind=True)
                child.wait()
                wrong = told(child, errno.ENOSPC) + harmed(run, 0, child)
                ends[how(child) if child.status else "fitted, or did without"] += 1
                mount("-o", "remount,size=64m", run.disk)
                again = run.go()
                wrong += [again.stderr] if again.wait() else run.faults(shop.whole(VARIANT, *CHANGES))
            finally:
                subprocess.run(["umount", str(run.disk)], check=True)
            failures += [f"tmpfs of {size} KiB: {line}" for line in wrong]
            print(*failures[-len(wrong) :] if wrong else [], sep="\n", end="\n" if wrong else "", flush=True)
    detail = ", ".join(f"{end} {times}" for end, times in sorted(ends.items()))
    rows.append(
        f"{'a run on a tmpfs of 16 to 1984 KiB':<44} {'':>10} {len(sizes):>7} {len(failures):>8}  {detail}"
    )
    print(rows[-1])
    return bool(failures)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--error", choices=["ENOSPC", "EIO", "EACCES", "KILL"], default="ENOSPC")
    parser.add_argument("--every", type=int, default=1, help="only every so-and-so-many-th operation or size")
    given = parser.parse_args()
    if INSIDE in os.environ:
        sys.exit(small_disks(given.every))
    error = KILLED if given.error == "KILL" else getattr(errno, given.error)
    rows: list[str] = []
    failures: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            sys.exit("this needs Linux and a C compiler")
        with Nursery(preload=library) as nursery:
            every_operation(Workshop(Path(folder) / "shop", nursery), error, given.every, rows, failures)
    status = real_disk(given.every) if given.error == "ENOSPC" else 0
    print(f"\n{given.error:<44} {'operations':>10} {'failed':>7} {'wrongly':>8}\n" + "\n".join(rows))
    print(f"{len(failures)} failures, {time.monotonic() - began:.0f} seconds")
    sys.exit(bool(failures) or status)


if __name__ == "__main__":
    main()
