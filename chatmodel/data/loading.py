"""How are batches made ready while the device works, without ever waiting for a disk in silence?"""

import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import TypeVar

from chatmodel.runtime import UserError

Item = TypeVar("Item")

TIMEOUT_SECONDS = 300.0


def read_ahead(
    items: Iterator[Item], *, source: str, timeout: float | None = TIMEOUT_SECONDS, depth: int = 2
) -> Iterator[Item]:
    """The items, each made by a thread while the ones before are used.

    Errors come where the item would have. An item that carries the state behind it, as those of `PackedRows.batches`,
    keeps resuming exact, however far the thread is ahead.

    Args:
        source: what is read, for the error.
        timeout: seconds to wait for an item; None for no end.
        depth: items that lie ready at most.

    Raises:
        UserError: an item takes longer.
    """
    if timeout is not None and timeout <= 0:
        raise UserError(f"the timeout of reading is {timeout}; give a number of seconds above 0")
    ready: Queue[tuple[bool, Item | BaseException | None]] = Queue(depth)
    closed = threading.Event()

    def read() -> None:
        try:
            for item in items:
                ready.put((True, item))
                if closed.is_set():
                    return
            ready.put((False, None))
        except BaseException as error:
            ready.put((False, error))

    # A daemon, for a thread that hangs in the file system must not keep the process alive.
    threading.Thread(target=read, name=f"reading {source}", daemon=True).start()
    try:
        yield from take_items(ready, source=source, timeout=timeout)
    finally:
        closed.set()
        while not ready.empty():  # the thread may be waiting to put one more
            ready.get_nowait()


def take_items(
    ready: "Queue[tuple[bool, Item | BaseException | None]]", *, source: str, timeout: float | None
) -> Iterator[Item]:
    """What a reading thread put, until it says that there is no more."""
    while True:
        try:
            more, item = ready.get(timeout=timeout)
        except Empty:
            raise UserError(
                f"reading {source} has hung for {timeout:.0f} s; check the file system, then start again to continue"
                " from the last checkpoint"
            ) from None
        if isinstance(item, BaseException):
            raise item
        if not more:
            return
        yield item  # type: ignore[misc]
