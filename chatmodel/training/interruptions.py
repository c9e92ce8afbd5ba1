"""What interrupts the steps of a run: signals that ask it to stop, and Python's garbage collector?"""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Slurm sends the second before a job's time is over (--signal=USR1@120), torchrun and Kubernetes the first.
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequested(Exception):
    """A signal came where there is nothing to save."""


class StopSignals:
    """Within `with`, signals only set `received`, which the loop reads after a step; Ctrl-C after one ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch that a signal may break off, as everything is saved; raises `StopRequested` where it stands."""
        self._at_once = True
        try:
            if self.received:
                raise StopRequested
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._at_once:
            raise StopRequested


@contextmanager
def collector_paused() -> Iterator[None]:
    """Give Python's collector, which `freeze_garbage` turns off, back as it was."""
    was_enabled = gc.isenabled()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def freeze_garbage() -> None:
    """Turn Python's collector off, and never look again at what lives now.

    It walks through all objects, some hundred thousand after the imports, whenever it likes, on each rank at another
    time, and all ranks wait for the one that is at it. Steps leave no cycles; evaluations do, and collect them.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
