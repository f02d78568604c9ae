"""Damage a checkpoint in every small way, and see that each is found and the checkpoint before it is used.

    python tests/stress/flips.py            # about a minute; --bits 8 flips each bit of each byte

A tiny run (rank 1) leaves two checkpoints. In the newer one: each byte is changed, each file is cut at every
byte below 4 KB and at every 4 KB, each is removed, replaced by a folder, a link or another's content, and
files, folders and links are added. What `--resume` would take up must be the older one, every time; for a
sample of them a run really resumes and must end with the same adapter. Exit status 1 if anything is
otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nursery import Nursery
from tiny_runs import STEPS, TinyRun, Workshop

from lora_dpo.run_directory import damage
from lora_dpo.training.keeping import Checkpoints

SMALL = ["adapter.rank=1", "adapter.targets=q_proj", "training.keep_checkpoints=2"]
Damage = tuple[str, str, Callable[[], object]]
"""(kind, what exactly, what does it)."""


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def put_back(folder: Path) -> Iterator[None]:
    """Whatever is done to a checkpoint inside is undone."""
    copy = folder.parent.parent / "checkpoint-copy"
    shutil.copytree(folder, copy)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        os.replace(copy, folder)


def flipped(file: Path, every: int = 1, bits: int = 1) -> Iterator[Damage]:
    """One byte changed at a time; undone by the next. bits: how many ways each is changed."""
    whole = file.read_bytes()
    for at in range(0, len(whole), every):
        for bit in range(bits):
            mask = 1 << ((at + bit) % 8)

            def flip(at: int = at, mask: int = mask) -> None:
                with file.open("r+b") as content:
                    content.write(whole)
                    content.seek(at)
                    content.write(bytes([whole[at] ^ mask]))

            yield "byte flipped", f"{file.name} byte {at}", flip
    file.write_bytes(whole)


def cut(file: Path, every: int = 1) -> Iterator[Damage]:
    """The file cut at every byte below 4 KB, and at every 4 KB; and with a byte more."""
    whole = file.read_bytes()
    places = {*range(0, min(4096, len(whole)), every), *range(0, len(whole), 4096), len(whole) - 1}
    for at in sorted(places):
        yield "cut", f"{file.name} at byte {at}", lambda at=at: file.write_bytes(whole[:at])
    yield "longer", file.name, lambda: file.write_bytes(whole + b"\0")
    yield "longer", file.name, lambda: file.write_bytes(whole + b"\n")
    file.write_bytes(whole)


def structural(folder: Path) -> Iterator[Damage]:
    """Files and folders missing, added, and of another kind. Each is done to a fresh copy."""
    for file in files_of(folder):
        name = file.relative_to(folder).as_posix()
        yield "missing", name, file.unlink
        yield "a folder instead", name, lambda file=file: (file.unlink(), file.mkdir())
        yield "a link instead", name, lambda file=file: _linked(file, folder.parent.parent / "moved")
        yield "renamed", name, lambda file=file: file.rename(file.with_name("." + file.name))
        others = [
            other for other in files_of(folder) if other != file and other.read_bytes() != file.read_bytes()
        ]
        for other in others:
            yield "another's content", name, lambda a=file, b=other: a.write_bytes(b.read_bytes())
    for place in (folder, *[path for path in folder.rglob("*") if path.is_dir()]):
        for name in ("extra", ".hidden", ".state.json.part", "manifest.json.bak", "model.safetensors"):
            yield "extra file", name, lambda file=place / name: file.write_bytes(b"")
        if place != folder:
            yield (
                "extra file",
                "manifest.json",
                lambda place=place: (place / "manifest.json").write_text("{}"),
            )
            yield "missing", place.name, lambda place=place: shutil.rmtree(place)
        yield "extra folder", "empty", (place / "empty").mkdir
        yield "extra folder", ".hidden", lambda place=place: (place / ".a" / "b").mkdir(parents=True)
        yield (
            "extra link",
            "to a file",
            lambda place=place: (place / "link").symlink_to(folder / "state.json"),
        )
        yield "extra link", "to a folder", lambda place=place: (place / "link").symlink_to(folder)
        yield "extra link", "to nothing", lambda place=place: (place / "link").symlink_to("nowhere")
        yield "extra pipe", "", lambda place=place: os.mkfifo(place / "pipe")


def _linked(file: Path, outside: Path) -> None:
    shutil.move(file, outside)
    file.symlink_to(outside)


def unseen(run: TinyRun, *, every: int = 1, bits: int = 1) -> tuple[Counter[str], list[str]]:
    """(how many damages of each kind there were, those after which the older checkpoint would not be used).

    every: only so-and-so-many-th bytes are flipped, and cut at.
    """
    older, newest = run.directory.checkpoints()
    done: Counter[str] = Counter()
    missed: list[str] = []

    def look(kind: str, what: str) -> None:
        done[kind] += 1
        said: list[str] = []
        taken = Checkpoints(run.directory, 2).newest(said.append)
        if taken != older or len(said) != 1 or newest.name not in said[0]:
            missed.append(f"{kind}: {what}")

    with put_back(newest):
        for file in files_of(newest):
            for ways in (flipped(file, every, bits), cut(file, every)):
                for kind, what, act in ways:
                    act()
                    look(kind, what)
        if damage(newest) is not None:
            missed.append("not put back as it was: the script is wrong")
    for kind, what, act in list(structural(newest)):
        with put_back(newest):
            act()
            look(kind, what)
    return done, missed


def two_checkpoints(shop: Workshop, name: str = "flipped") -> TinyRun:
    """A run that has ended, and left its last two checkpoints."""
    run = shop.begin("plain", name, *SMALL, "training.best_metric=null")
    child = run.go()
    if child.wait() != 0 or len(run.directory.checkpoints()) != 2:
        raise RuntimeError(child.stderr)
    return run


def resumed_wrongly(shop: Workshop, damages: list[Callable[[Path], object]]) -> list[str]:
    """Runs whose newest checkpoint was damaged so, and that did not end as the uninterrupted one."""
    wrong = []
    whole = shop.whole("plain", *SMALL, "training.best_metric=null")
    for number, harm in enumerate(damages):
        run = two_checkpoints(shop, f"resumed-{number}")
        harm(run.directory.checkpoint_folder(STEPS))
        child = run.go()
        if child.wait() != 0:
            wrong.append(f"damage {number}: {child.stderr}")
        elif f"passed over step-{STEPS:06d}" not in child.stdout:
            wrong.append(f"damage {number}: it was not said that the checkpoint was passed over")
        wrong += [f"damage {number}: {fault}" for fault in run.faults(whole)]
    return wrong


def _flip_last(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


SAMPLE: list[Callable[[Path], object]] = [
    lambda folder: _flip_last(folder / "optimizer.safetensors"),
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "adapter" / "adapter_model.safetensors").write_bytes(b""),
    lambda folder: (folder / ".extra").mkdir(),
    lambda folder: _flip_last(folder / "state.json"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so-and-so-many-th byte")
    parser.add_argument("--bits", type=int, default=1, help="in how many ways a byte is changed, up to 8")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        shop = Workshop(Path(folder) / "shop", nursery)
        run = two_checkpoints(shop)
        size = sum(file.stat().st_size for file in files_of(run.directory.checkpoint_folder(STEPS)))
        done, missed = unseen(run, every=given.every, bits=given.bits)
        wrong = resumed_wrongly(shop, SAMPLE)
    print(f"\n{'bytes of the checkpoint':<40} {size:>7}")
    for kind, count in done.items():
        print(f"{kind:<40} {count:>7}")
    print(f"{'all':<40} {done.total():>7}\n{'not found, or the older one not used':<40} {len(missed):>7}")
    print(f"{'really resumed':<40} {len(SAMPLE):>7}\n{'  of them wrongly':<40} {len(wrong):>7}")
    print(f"{'seconds':<40} {time.monotonic() - began:>7.0f}")
    print("\n".join(missed[:20] + wrong))
    sys.exit(bool(missed or wrong))


if __name__ == "__main__":
    main()
