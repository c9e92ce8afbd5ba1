"""Reading ahead: everything in order, errors in their place, and no waiting without end."""

import threading
import time

import pytest

from chatmodel.data.loading import read_ahead
from chatmodel.runtime import UserError


def live_readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "reading a test"]


def wait_for_no_readers() -> None:
    deadline = time.monotonic() + 5
    while live_readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live_readers() == []


def test_everything_in_order():
    assert list(read_ahead(iter(range(100)), source="a test")) == list(range(100))
    wait_for_no_readers()


def test_it_is_no_more_than_so_far_ahead():
    made = []

    def items():
        for n in range(100):
            made.append(n)
            yield n

    ahead = read_ahead(items(), source="a test", depth=3)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 4]  # one taken, three that lie ready, and one that waits to be put there
    assert next(ahead) == 1
    ahead.close()
    wait_for_no_readers()
    assert len(made) < 10


def test_errors_come_in_their_place():
    def items():
        yield 1
        raise UserError("the disk is gone")

    ahead = read_ahead(items(), source="a test")
    assert next(ahead) == 1
    with pytest.raises(UserError, match="the disk is gone"):
        next(ahead)


def test_hanging_ends_in_an_error():
    release = threading.Event()

    def items():
        yield 1
        release.wait(20)
        yield 2

    ahead = read_ahead(items(), source="the token store X", timeout=0.2)
    assert next(ahead) == 1
    began = time.monotonic()
    with pytest.raises(UserError, match="reading the token store X has hung for 0 s; check the file system"):
        next(ahead)
    assert time.monotonic() - began < 5
    release.set()


def test_timeout_must_be_positive():
    with pytest.raises(UserError, match="timeout of reading is 0; give"):
        next(read_ahead(iter([1]), source="a test", timeout=0))
