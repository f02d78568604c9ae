"""Runs that are killed, stopped, damaged, starved of disk or begun twice. More of each: tests/stress/."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator

import pytest
from failing import compiled
from flips import SAMPLE, resumed_wrongly, two_checkpoints, unseen
from full_disk import CHANGES, VARIANT, operations, run_faults
from kills import kill_runs
from nursery import Nursery
from signals import CASES, MORE, Case, export_faults, faults
from tiny_runs import Workshop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Where tiny runs are begun, each in a child of one process; their disk can fail."""
    folder = tmp_path_factory.mktemp("reliability")
    with Nursery(preload=compiled(folder)) as nursery:
        yield Workshop(folder / "shop", nursery)


def test_runs_killed_anywhere_end_with_the_same_adapter_and_metrics(shop: Workshop):
    tally = kill_runs(shop, 8, seed=1, names=["plain", "state"])
    assert tally.failures == []
    assert tally.identical == tally.runs
    assert tally.total >= 8
    assert tally.inside >= 4


def test_every_damage_to_a_checkpoint_is_found_and_the_one_before_is_taken(shop: Workshop):
    done, missed = unseen(two_checkpoints(shop), every=61)
    assert missed == []
    kinds = {"byte flipped", "cut", "longer", "missing", "extra file", "extra folder", "extra link"}
    assert kinds <= done.keys()
    assert done["byte flipped"] > 100


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_adapter(shop: Workshop):
    assert resumed_wrongly(shop, SAMPLE[:1]) == []


@pytest.mark.parametrize("case", [*CASES, MORE[-1]], ids=lambda case: case.name)
def test_sigterm_in_any_phase_loses_at_most_a_step_and_the_run_goes_on(shop: Workshop, case: Case):
    lost, wrong = faults(shop, case, signal.SIGTERM)
    assert wrong == []
    assert lost <= 1


def test_a_second_signal_ends_a_step_at_once(shop: Workshop):
    (forward,) = [case for case in CASES if case.name == "forward"]
    _, wrong = faults(shop, forward, signal.SIGINT, twice=True)
    assert wrong == []


@pytest.mark.parametrize(("kind", "number"), [("adapter", signal.SIGTERM), ("merged", signal.SIGINT)])
def test_an_export_that_is_stopped_leaves_nothing_and_says_so(shop: Workshop, kind: str, number: int):
    assert export_faults(shop, kind, number) == []


def test_a_disk_that_fails_is_said_in_a_line_and_harms_nothing_that_was_written(shop: Workshop):
    if compiled(shop.folder) is None:
        pytest.skip("needs Linux and a C compiler")
    count = operations(shop.begin(VARIANT, "counted", *CHANGES))
    assert count > 100
    places = [
        (1, errno.ENOSPC),
        (count // 3, errno.EACCES),
        (count // 2, errno.ENOSPC),
        (count - 1, errno.ENOSPC),
    ]
    ends = set()
    for at, error in places:
        end, wrong = run_faults(shop, f"failing-{at}", at, error)
        assert wrong == [], f"{errno.errorcode[error]} at operation {at} of {count}"
        ends.add(end)
    assert "refused in a line" in ends


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(shop: Workshop):
    run = shop.begin("plain", "two-at-once")
    first = run.go(pause="load")
    assert first.reaches(lambda flags: flags["paused"] == 1)
    second = run.go()
    assert second.wait() == 2
    assert second.stderr.startswith("error: another process is training in ")
    first.flags["go"] = 1
    assert first.wait() == 0, first.stderr
    assert run.faults(shop.whole("plain")) == []


def test_resuming_a_run_that_still_runs_is_refused_and_it_goes_on(shop: Workshop):
    run = shop.begin("plain", "resumed-at-once")
    first = run.go(pause="forward", after=2)
    assert first.reaches(lambda flags: flags["paused"] == 1)
    for words in ([], ["--resume"]):
        second = run.run("train", run.folder / "recipe.yaml", *words)
        assert second.wait() == 2
        assert len(second.stderr.splitlines()) == 1
    assert "another process is training" in second.stderr
    first.flags["go"] = 1
    assert first.wait() == 0, first.stderr
    assert run.faults(shop.whole("plain")) == []


def test_the_lock_of_a_killed_process_is_not_in_the_way(shop: Workshop):
    run = shop.begin("plain", "stale-lock")
    child = run.go(pause="forward", after=2)
    assert child.reaches(lambda flags: flags["paused"] == 1)
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (run.directory.path / ".lock").exists()
    again = run.go()
    assert again.wait() == 0, again.stderr
    assert run.faults(shop.whole("plain")) == []
