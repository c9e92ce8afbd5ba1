"""How far is an evaluation of many tasks, how fast, and how long will it take?"""

import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

from chatmodel.evaluation.scoring import get_rank
from chatmodel.runtime import logger

# Seconds between lines in the log, for those who see no bar.
LOG_EVERY = 60.0
SPELLED = ((3600.0, "h"), (60.0, "min"))


class WorkProgress:
    """A bar over the estimated work of all tasks, on a terminal; elsewhere a line in the log now and then."""

    def __init__(self, name: str, work: Mapping[str, float]) -> None:
        self.name, self.work = name, dict(work)
        self.shares = dict.fromkeys(work, 0.0)
        self.total = max(sum(work.values()), 1e-9)
        self.started = self.logged = time.monotonic()
        first = get_rank()[0] == 0
        shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=self.total, desc=name, bar_format=shape, leave=False, disable=None if first else True)
        self.speaks = first and self.bar.disable

    def __enter__(self) -> "WorkProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, label: str, share: float) -> None:
        """A further share of a task's examples is done."""
        self._set(label, min(1.0, self.shares[label] + share))

    def finish(self, label: str) -> None:
        """A task is done."""
        self._set(label, 1.0)

    def done(self) -> float:
        """The share of all work that is done."""
        return sum(self.shares[label] * work for label, work in self.work.items()) / self.total

    def seconds_left(self) -> float:
        """At the speed so far."""
        done = self.done()
        return (time.monotonic() - self.started) * (1.0 - done) / max(done, 1e-9)

    def _set(self, label: str, share: float) -> None:
        more = (share - self.shares[label]) * self.work[label]
        self.shares[label] = share
        self.bar.set_postfix_str(f", {label}", refresh=False)
        self.bar.update(more)
        now = time.monotonic()
        if self.speaks and now - self.logged > LOG_EVERY:
            self.logged = now
            logger.info("%s: %.0f %% done, about %s left", self.name, 100 * self.done(), spell(self.seconds_left()))


def spell(seconds: float) -> str:
    """A duration with one unit."""
    for size, unit in SPELLED:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
