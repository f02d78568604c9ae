"""What malloc holds is given back when holes add up, and only then."""

from __future__ import annotations

from lora_dpo.training.host_memory import Heap


class Process:
    """A process that holds `held` bytes, of which `needed` stay after giving back."""

    def __init__(self):
        self.held = 0
        self.given_back = 0
        self.heap = Heap(lambda: self.held, self.give_back)

    def give_back(self) -> None:
        self.given_back += 1
        self.held = 0

    def microbatch(self, needs: int, holes: int = 0) -> None:
        """One that needs so much, and can't use `holes` of what is held."""
        self.held = max(self.held + holes, needs)
        self.heap.after_microbatch()


def test_what_is_held_is_kept_while_it_is_no_more_than_one_needs():
    process = Process()
    process.microbatch(100)  # before it, loading may have left anything: given back once
    for _ in range(5):
        process.microbatch(100)
    assert process.given_back == 1


def test_holes_are_given_back_before_they_add_up():
    process = Process()
    process.microbatch(100)
    process.microbatch(100)
    peaks = []
    for _ in range(20):
        process.microbatch(60, holes=10)
        peaks.append(process.held)
    assert max(peaks) <= 102
    assert 1 < process.given_back < 15


def test_a_larger_one_sets_what_may_be_held():
    process = Process()
    for needs in (50, 50, 200, 200, 50, 200):
        process.microbatch(needs)
    before = process.given_back
    for _ in range(5):
        process.microbatch(200)
    assert process.given_back == before
