"""How far is long work, how fast, and how long will it take: a bar on a terminal, elsewhere lines in the log?"""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from chatmodel.runtime import logger

# Seconds between lines in the log, for those who see no bar.
LOG_EVERY = 60.0
SPELLED = ((3600.0, "h"), (60.0, "min"))


class ItemProgress(tqdm):  # type: ignore[misc]
    """Counts items of one kind; `update` says how many more are done. The first rank alone shows it.

    Args:
        unit: what an item is called. total: how many there are, if that is known.
        shown: False counts in silence.
    """

    def __init__(self, label: str, *, unit: str, total: int | None = None, shown: bool = True) -> None:
        shown = shown and _is_first_rank()
        super().__init__(desc=label, unit=f" {unit}", total=total, disable=None if shown else True, leave=False)
        self.speaks = shown and self.disable
        self.label, self.item, self.count = label, unit, 0
        self.started = self.logged = time.monotonic()
        self.expected = total

    def update(self, n: float | None = 1) -> Any:
        """So many more items are done."""
        self.count += int(n or 0)
        now = time.monotonic()
        if self.speaks and now - self.logged > LOG_EVERY:
            self.logged = now
            speed = self.count / (now - self.started)
            whole, left = "", ""
            if self.expected is not None:
                whole = f" of {self.expected:,}"
                left = f", about {spell((self.expected - self.count) / max(speed, 1e-9))} left"
            logger.info("%s: %s%s, %.3g %s/s%s", self.label, f"{self.count:,}", whole, speed, self.item, left)
        return super().update(n)


class WorkProgress:
    """Counts the estimated work of tasks of different size."""

    def __init__(self, name: str, work: Mapping[str, float]) -> None:
        self.name, self.work = name, dict(work)
        self.shares = dict.fromkeys(work, 0.0)
        self.total = max(sum(work.values()), 1e-9)
        self.started = self.logged = time.monotonic()
        first = _is_first_rank()
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


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def spell(seconds: float) -> str:
    """A duration with one unit."""
    for size, unit in SPELLED:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
