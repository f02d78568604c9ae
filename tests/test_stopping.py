"""Signals: what is whole ends whole, and everything else ends at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lora_dpo.stopping import Interrupted, Stops

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_where_nothing_is_held_and_tells_its_status(number: signal.Signals):
    before = signal.getsignal(number)
    with Stops().listening() as stops, pytest.raises(Interrupted) as raised:
        send(number)
    assert raised.value.code == 128 + number
    assert stops.asked == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_waits_for_what_is_held(number: signal.Signals):
    said: list[str] = []
    with Stops(said.append).listening() as stops:
        with stops.held():
            send(number)
            ended = True
        assert ended
        assert stops.asked == number
        assert len(said) == 1
        with pytest.raises(Interrupted):
            stops.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_signal_once_more_stops_at_once(number: signal.Signals):
    with Stops().listening() as stops, stops.held():
        send(number)
        with pytest.raises(Interrupted):
            send(number)


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGHUP, signal.SIGHUP), (signal.SIGINT, signal.SIGTERM)]
)
def test_one_wish_that_comes_twice_by_other_ways_cuts_nothing(first: int, second: int):
    with Stops().listening() as stops, stops.held():
        send(first)
        send(second)
        assert stops.asked == first


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops().listening() as stops:
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert stops.asked is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_callers_handlers_alone():
    found = []

    def inside() -> None:
        with Stops().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]
