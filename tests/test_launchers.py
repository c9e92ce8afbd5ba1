"""A signal to stop reaches what was launched, once, and whoever launched it waits for the end."""

import os
import pty
import signal
import sys
import time

import psutil
import pytest
from tiny_pretraining import fork, wait

from chatmodel import launchers
from chatmodel.launchers import ACCELERATE_MARK, LAUNCHER, TORCHRUN_MARK, Launch, follow_launcher

# Notes each signal; ends with 5 some time after the first, as if it had something to save, or at the second SIGINT.
COMMAND = """
import os, signal, sys, time
def note(number, frame):
    with open(sys.argv[1], "a") as file:
        file.write(signal.Signals(number).name + " ")
    heard.append(number)
heard = []
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), note)
open(sys.argv[1], "a").write(f"{os.getpid()} ")
while not heard:
    time.sleep(0.01)
began = time.monotonic()
while time.monotonic() - began < float(sys.argv[2]) and heard.count(signal.SIGINT) < 2:
    time.sleep(0.01)
open(sys.argv[1], "a").write("saved")
sys.exit(5)
"""
# A launcher that dies of signals and tells nobody; its worker notices.
CARELESS = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]]).wait()
"""
WORKER = """
import os, sys, time
parent = os.getppid()
open(sys.argv[1], "a").write(f"{os.getpid()} ")
while os.getppid() == parent:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "a").write("saved")
"""


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def read_words(path):
    return path.read_text().split() if path.exists() else []


def be_launched(marks, told):
    """What follows its launcher, and notes that it is told to stop."""
    signal.signal(signal.SIGTERM, lambda *_: (told.write_text("SIGTERM"), os._exit(0)))
    os.environ.update({mark: str(os.getppid()) for mark in marks})
    launchers.CHECK_SECONDS = 0.02
    follow_launcher()
    told.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(60)


def launch_and_sleep(marks, told):
    if not os.fork():
        be_launched(marks, told)
    time.sleep(60)


@pytest.mark.parametrize("marks", [[LAUNCHER], [TORCHRUN_MARK], [ACCELERATE_MARK], [LAUNCHER, ACCELERATE_MARK]])
def test_what_was_launched_stops_when_its_launcher_dies(marks, tmp_path):
    told, log = tmp_path / "told", tmp_path / "log"
    launcher = fork(launch_and_sleep, marks, told, log=log)
    wait_for(lambda: read_words(told.with_suffix(".pid")))
    time.sleep(0.1)
    assert not told.exists()
    os.kill(launcher, signal.SIGKILL)
    wait_for(lambda: read_words(told))
    assert wait(launcher) == [-signal.SIGKILL]
    assert log.read_text().count("the program that launched it has ended") == 1


def test_what_a_person_started_goes_on_without_their_shell(tmp_path, monkeypatch):
    for mark in (LAUNCHER, TORCHRUN_MARK, ACCELERATE_MARK):
        monkeypatch.delenv(mark, raising=False)
    told, log = tmp_path / "told", tmp_path / "log"
    shell = fork(launch_and_sleep, [], told, log=log)
    child = psutil.Process(int(*wait_for(lambda: read_words(told.with_suffix(".pid")))))
    os.kill(shell, signal.SIGKILL)
    wait(shell)
    time.sleep(0.2)
    assert child.is_running()
    child.kill()
    assert not told.exists()


def test_a_launcher_of_ours_that_is_gone_already(tmp_path):
    gone = fork(lambda: None, log=tmp_path / "log")
    wait(gone)
    told, log = tmp_path / "told", tmp_path / "log"
    os.environ[LAUNCHER] = str(gone)
    try:
        child = fork(follow_and_sleep, told, log=log)
    finally:
        del os.environ[LAUNCHER]
    assert wait(child) == [-signal.SIGTERM]


def follow_and_sleep(told):
    follow_launcher()
    time.sleep(60)


@pytest.mark.parametrize(
    ("marks", "sessions", "expected"),
    [
        ([ACCELERATE_MARK], {0: 7, os.getppid(): 1}, True),
        ([ACCELERATE_MARK], {0: 7, os.getppid(): 7}, False),
        ([ACCELERATE_MARK], {0: os.getpid(), os.getppid(): 1}, False),  # setsid
        ([ACCELERATE_MARK, TORCHRUN_MARK], {0: 7, os.getppid(): 1}, False),
        ([], {0: 7, os.getppid(): 1}, False),
    ],
)
def test_accelerate_was_gone_before_it_could_be_looked_for(monkeypatch, marks, sessions, expected):
    for mark in (TORCHRUN_MARK, ACCELERATE_MARK):
        monkeypatch.delenv(mark, raising=False)
    for mark in marks:
        monkeypatch.setenv(mark, "x")
    monkeypatch.setattr(launchers.os, "getsid", sessions.get)
    assert launchers.was_given_away() is expected


def launch(command, **options):
    launched = Launch(command, name="stage base", **options)
    code = launched.run()
    sys.exit(code + 10 * (launched.received or 0))


@pytest.mark.parametrize("name", launchers.PASSED_ON)
def test_a_signal_is_passed_on_and_waited_for(name, tmp_path):
    heard, log = tmp_path / "heard", tmp_path / "log"
    launcher = fork(launch, [sys.executable, "-c", COMMAND, str(heard), "0.5"], log=log)
    wait_for(lambda: read_words(heard))
    number = getattr(signal, name)
    os.kill(launcher, number)
    assert wait(launcher) == [(5 + 10 * number) % 256]
    assert read_words(heard)[1:] == [name, "saved"]
    assert log.read_text().count(f"{name} is passed on to stage base") == 1


def launch_in_terminal(command, log):
    """A terminal whose only program launches the command; returns its process id and what a person types into."""
    child, keyboard = pty.fork()
    if not child:
        os._exit(wait(fork(launch_in_foreground, command, log=log))[0])
    return child, keyboard


def launch_in_foreground(command):
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    launch(command)


def test_the_terminal_interrupts_once_and_a_second_time_is_passed_on(tmp_path):
    heard, log = tmp_path / "heard", tmp_path / "log"
    shell, keyboard = launch_in_terminal([sys.executable, "-c", COMMAND, str(heard), "60"], log)
    wait_for(lambda: read_words(heard))
    os.write(keyboard, b"\x03")
    wait_for(lambda: "SIGINT" in read_words(heard))
    time.sleep(0.4)  # longer than subprocess.run would wait before it kills
    assert read_words(heard)[1:] == ["SIGINT"]
    os.write(keyboard, b"\x03")
    assert wait(shell) == [5 + 10 * signal.SIGINT]
    os.close(keyboard)
    assert read_words(heard)[1:] == ["SIGINT", "SIGINT", "saved"]
    assert log.read_text().count("Ctrl-C again ends it at once") == 1


def test_pausing_pauses_the_command_too(tmp_path):
    heard, log = tmp_path / "heard", tmp_path / "log"
    launcher = fork(launch, [sys.executable, "-c", COMMAND, str(heard), "0"], log=log)
    command = psutil.Process(int(*wait_for(lambda: read_words(heard))))
    os.kill(launcher, signal.SIGTSTP)
    wait_for(lambda: command.status() == psutil.STATUS_STOPPED)
    os.kill(launcher, signal.SIGCONT)
    wait_for(lambda: command.status() != psutil.STATUS_STOPPED)
    os.kill(launcher, signal.SIGTERM)
    assert wait(launcher) == [5 + 10 * signal.SIGTERM]


def test_what_a_launcher_leaves_behind_is_waited_for(tmp_path):
    heard, log = tmp_path / "heard", tmp_path / "log"
    command = [sys.executable, "-c", CARELESS, str(heard), WORKER]
    launcher = fork(launch, command, by_launcher=True, log=log)
    wait_for(lambda: read_words(heard))
    os.kill(launcher, signal.SIGTERM)
    assert wait(launcher) == [10 * signal.SIGTERM - signal.SIGTERM]
    assert read_words(heard)[1:] == ["saved"]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    heard, log = tmp_path / "heard", tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        launcher = fork(launch, [sys.executable, "-c", COMMAND, str(heard), "0"], log=log)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: read_words(heard))
    os.kill(launcher, signal.SIGINT)
    time.sleep(0.2)
    os.kill(launcher, signal.SIGTERM)
    assert wait(launcher) == [5 + 10 * signal.SIGTERM]
    assert "SIGINT" not in read_words(heard)
