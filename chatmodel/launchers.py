"""How does a signal to stop reach a run through the program that started it: speedrun, accelerate launch, torchrun?"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

LAUNCHER = "CHATMODEL_LAUNCHER"  # the process id of a launcher of ours
# What these two set in all that they start, whatever their options, and nobody sets by hand.
TORCHRUN_MARK, ACCELERATE_MARK = "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_FULLGRAPH"

CHECK_SECONDS = 1.0
SAVING_SECONDS = 600.0  # for what a launcher left behind to save its state and end
PASSED_ON = ("SIGTERM", "SIGUSR1", "SIGINT")


def follow_launcher() -> None:
    """Have this process sent SIGTERM once the program that launched it is gone; nothing where nobody launched it.

    `accelerate launch` dies of SIGTERM, and torchrun of SIGUSR1, without a word to what they started. A recipe that a
    person started goes on without their shell. By looking now and then: only Linux could tell (PR_SET_PDEATHSIG), and
    there the end of the thread that forked would count.
    """
    launchers = [find_process(pid) for pid in list_launchers()]
    if launchers:
        threading.Thread(target=_stop_without, args=(launchers,), daemon=True).start()


def list_launchers() -> list[int]:
    """The process ids of what launched this process: a script of ours, a launcher that is its parent, or both."""
    ours = [int(os.environ[LAUNCHER])] if LAUNCHER in os.environ else []
    theirs = [os.getppid()] if {TORCHRUN_MARK, ACCELERATE_MARK} & os.environ.keys() else []
    return ours + theirs


def find_process(pid: int) -> psutil.Process | None:
    """The process of this id, or None if it has ended; a later one of the same id is not taken for it."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def was_given_away() -> bool:
    """Whether `accelerate launch` was gone before it could be looked for, as imports take seconds.

    Who takes orphans in lives in another session, accelerate in that of its child, torchrun in any.
    """
    session = os.getsid(0)
    if ACCELERATE_MARK not in os.environ or TORCHRUN_MARK in os.environ or session == os.getpid():
        return False
    with suppress(OSError):
        return os.getsid(os.getppid()) != session
    return False


def _stop_without(launchers: list[psutil.Process | None]) -> None:
    while not was_given_away() and all(map(_is_alive, launchers)):
        time.sleep(CHECK_SECONDS)
    with suppress(OSError):  # the launcher may have taken the terminal along
        sys.stderr.write(f"process {os.getpid()} is stopped, as the program that launched it has ended\n")
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: psutil.Process | None) -> bool:
    """Whether a process has not ended; one has ended whose end nobody has looked at."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launch:
    """A command, run to its end, that gets the signals which ask this process to stop or to pause.

    It has a process group of its own: of the terminal's Ctrl-C it would hear twice otherwise, and end at once.

    Args:
        name: what is running, for the user.
        by_launcher: the command is a launcher, and what works is a child of it.
    """

    def __init__(self, command: Sequence[str], *, name: str, by_launcher: bool = False) -> None:
        self.command, self.name, self.by_launcher = command, name, by_launcher
        self.received: int | None = None  # the first signal
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: list[psutil.Process] = []

    def run(self) -> int:
        """The command's exit code; after a signal its workers, which a launcher may leave behind, have ended too."""
        with self._handling_signals():
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,  # who reads the terminal from its background is stopped
                process_group=0,
                env=os.environ | {LAUNCHER: str(os.getpid())},
            )
            if self.received is not None:  # while it was being started
                self._pass_on(self.received)
            code = self._process.wait()
            psutil.wait_procs(self._workers, timeout=SAVING_SECONDS)
        return code

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        handlers = {getattr(signal, name): self._receive for name in PASSED_ON} | {signal.SIGTSTP: self._pause}
        # What is ignored, because of `nohup` or as this runs in a script's background, stays ignored.
        heard = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handlers[number]) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            sys.stderr.write(f"\n{name} is passed on to {self.name}, which may have something to save{again}\n")
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._process is None:
            return
        if self._process.poll() is not None:
            for worker in self._workers:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)
            return
        if self.by_launcher and not self._workers:
            with suppress(psutil.NoSuchProcess):
                self._workers = psutil.Process(self._process.pid).children()
        self._process.send_signal(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z, and `fg` or `bg` after it, for both."""
        self._signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: int) -> None:
        if self._process is not None:
            with suppress(OSError):
                os.killpg(self._process.pid, number)
