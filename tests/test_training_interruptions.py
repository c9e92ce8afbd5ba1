"""Signals are noted and wait for the end of a step, and the garbage collector is given back as it was."""

import gc
import os
import signal

import pytest

from chatmodel.training.interruptions import SIGNALS, StopRequested, StopSignals, collector_paused, freeze_garbage


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_noted(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == name
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # schedulers repeat themselves
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", SIGNALS)
def test_interrupting_after_another_signal_means_now(first):
    with StopSignals() as signals:
        os.kill(os.getpid(), getattr(signal, first))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == first


def test_where_nothing_is_to_be_saved_a_signal_stops_at_once():
    went_on = []

    def measure(signals, *, be_stopped):
        with signals.at_once():
            if be_stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            went_on.append(be_stopped)

    with StopSignals() as signals:
        measure(signals, be_stopped=False)
        with pytest.raises(StopRequested):
            measure(signals, be_stopped=True)
        with pytest.raises(StopRequested):  # the signal from before counts as well
            measure(signals, be_stopped=False)
    assert went_on == [False]


def test_the_collector_is_off_and_then_as_before():
    class Cycle:
        alive = 0

        def __init__(self):
            self.me = self
            Cycle.alive += 1

        def __del__(self):
            Cycle.alive -= 1

    assert gc.isenabled()
    with collector_paused():
        freeze_garbage()
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        Cycle()
        assert Cycle.alive == 1
        freeze_garbage()  # collects what came since
        assert Cycle.alive == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
