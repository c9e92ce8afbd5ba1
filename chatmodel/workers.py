"""How is work spread over processes that have all this one has, and end with it?"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from chatmodel.runtime import UserError

PARENT_CHECK_SECONDS = 5.0

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None  # of a worker process


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_processes(work: Callable[[T], R], number: int, *, doing: str) -> Iterator[Callable[[T], "Future[R]"]]:
    """Forked processes, and a function that has one of them do `work` on its argument; they are gone afterwards.

    What `work` refers to is not copied but inherited; only arguments and results cross the border. For Linux: on macOS
    each process would import everything anew.

    Args:
        doing: "encodes text", say, for the message when a process is killed.

    Raises:
        UserError: a process was killed from outside.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(number, context, initializer=_start_worker, initargs=(work, os.getpid()))
    try:
        pool.submit(os.getpid).result()  # all are forked here, before any thread of the caller's begins
        yield lambda item: pool.submit(_do_work, item)
    except BrokenProcessPool:
        raise UserError(
            f"a process that {doing} was killed from outside, perhaps because memory ran out; free some memory and"
            " start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, ends when that is gone, and uses one core."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_if_orphaned(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGALRM, leave_if_orphaned)
    signal.setitimer(signal.ITIMER_REAL, PARENT_CHECK_SECONDS, PARENT_CHECK_SECONDS)
    gc.freeze()


def _do_work(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def run_in_order(
    items: Iterable[T], submit: Callable[[T], "Future[R]"], *, ahead: int
) -> Generator[tuple[T, "Future[R]"], None, None]:
    """Submit items, `ahead` of them before the first is waited for; gives each with its future, in their order.

    If `items` fails, that is raised after what came before it was given. What is left is cancelled.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    failure: Exception | None = None
    iterator = iter(items)
    try:
        while failure is None:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            pending.append((item, submit(item)))
            if len(pending) > ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
        if failure is not None:
            raise failure
    finally:
        for _, future in pending:
            future.cancel()
