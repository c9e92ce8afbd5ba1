"""What does a program that a model wrote do, when it runs where accidents stay small?

This is containment against accidents (endless loops, runaway memory, stray files, forgotten network calls), **not a
security sandbox**: a program that means harm can leave it, for example through native code, and it may read whatever
the user may read. Run models that you do not trust in a container or a virtual machine.

What holds a program:
- its own process and process group, killed at the time limit; an empty environment, no input, a temporary folder;
- limits on CPU seconds, address space, file size, open files and (except for root) processes;
- an audit hook: starting processes, sockets, foreign signals, native libraries and writing outside its folder raise
  `PermissionError`;
- on Linux, where the system allows user namespaces: no network device, and a process namespace that dies with it.
"""

import contextlib
import functools
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("chatmodel")

# Strongest first; each is tried once with an empty program, because containers often forbid some or all of them.
NAMESPACES = (
    ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    ("--user", "--map-root-user", "--net"),
)

# Audit events: beginnings of the refused ones; those whose leading arguments (how many) are paths that get changed.
REFUSED_EVENTS: tuple[str, ...] = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
REFUSED_EVENTS += ("subprocess.", "pty.", "socket.", "signal.pthread_kill", "ctypes.", "resource.", "syslog.")
CHANGED_PATHS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1}
CHANGED_PATHS |= {"os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "sqlite3.connect": 1}
# A name relative to an open folder (`dir_fd`) passes as relative to the program's; `rmtree` alone works that way.
CHANGED_PATHS |= {"shutil.rmtree": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended.

    `success` means that its last line was reached and it exited by itself with code 0: `sys.exit(0)` halfway is no
    success. `exit_code` is negative after a signal. Output beyond the limit is dropped and noted in `truncated`.
    """

    success: bool
    exit_code: int
    timed_out: bool
    stdout: str
    stderr: str
    truncated: bool
    seconds: float


def execute_python(
    code: str,
    *,
    timeout: float = 5.0,
    memory_bytes: int = 256 * 2**20,
    file_bytes: int = 2**20,
    output_bytes: int = 2**16,
) -> ExecutionResult:
    """Run `code` as a module named `program` (so an `if __name__ == "__main__"` block does not run), contained.

    Only the standard library can be imported. `file_bytes` bounds each file, `output_bytes` each of the two streams.

    Raises:
        RuntimeError: the system is neither Linux nor macOS.
    """
    if os.name != "posix":
        raise RuntimeError(f"model-written programs can be run on Linux and macOS, not on {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(code, encoding="utf-8", errors="replace")
        status_read, status_write = os.pipe()
        limits = {"status": status_write, "cpu": int(timeout) + 1, "memory": memory_bytes, "file": file_bytes}
        started = time.monotonic()
        process = subprocess.Popen(
            [*namespace_command(), *_interpreter(), __file__, json.dumps(limits)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status_write,),
            start_new_session=True,
        )
        os.close(status_write)
        assert process.stdout is not None
        assert process.stderr is not None
        pipes = [process.stdout.fileno(), process.stderr.fileno(), status_read]
        try:
            (stdout, stderr, status), timed_out = _watch(process, pipes, started + timeout, output_bytes)
        finally:
            _kill(process)
            os.close(status_read)
            process.stdout.close()
            process.stderr.close()
        seconds = time.monotonic() - started
    return ExecutionResult(
        success=bytes(status) == b"end" and process.returncode == 0 and not timed_out,
        exit_code=process.returncode,
        timed_out=timed_out,
        stdout=stdout[:output_bytes].decode(errors="replace"),
        stderr=stderr[:output_bytes].decode(errors="replace"),
        truncated=max(len(stdout), len(stderr)) > output_bytes,
        seconds=seconds,
    )


@functools.cache
def namespace_command() -> tuple[str, ...]:
    """The `unshare` call that takes network and foreign processes away; empty, with one warning, where none works."""
    unshare = shutil.which("unshare") if sys.platform == "linux" else None
    for flags in NAMESPACES if unshare else ():
        command = (str(unshare), *flags)
        probe = subprocess.run([*command, *_interpreter(), "-c", "pass"], capture_output=True, env={}, check=False)
        if probe.returncode == 0:
            return command
    logger.warning("model-written programs run without namespaces here: only Python's own checks keep the network off")
    return ()


def _interpreter() -> tuple[str, ...]:
    # -I: no environment, no user packages; -S: no installed packages; -B: no files beside the source.
    return (sys.executable, "-I", "-S", "-B", "-X", "utf8")


def _watch(
    process: subprocess.Popen[bytes], pipes: list[int], deadline: float, output_bytes: int
) -> tuple[list[bytearray], bool]:
    """Read all pipes until the process ends or time is up: (what each said, one byte past the limit; timed out)."""
    said = {pipe: bytearray() for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            ended = process.poll() is not None
            ready = selector.select(timeout=0.05)
            if ended and not ready:
                break  # a left-over child may hold the pipes open; nobody waits for it
            for key, _ in ready:
                chunk = os.read(key.fd, 2**16)
                if not chunk:
                    selector.unregister(key.fd)
                said[key.fd] += chunk[: output_bytes + 1 - len(said[key.fd])]
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return list(said.values()), True
    return list(said.values()), False


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_contained(limits: dict[str, int]) -> None:
    """The child's side: lower the limits, close the doors, run `program.py`, then say on the status pipe it ended."""
    import types

    _lower_limits(limits)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    code = compile(Path("program.py").read_text(encoding="utf-8"), "program.py", "exec")
    sys.addaudithook(functools.partial(_refuse, os.path.realpath(os.getcwd())))
    exec(code, module.__dict__)
    sys.stdout.flush()
    os.write(limits["status"], b"end")


def _lower_limits(limits: dict[str, int]) -> None:
    import resource

    # A process limit counts the user's other processes too, unless a user namespace starts a count of its own.
    # Root is exempt. macOS refuses to limit the address space.
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 32,
        resource.RLIMIT_AS: limits["memory"],
    }
    for kind, value in wanted.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _refuse(folder: str, event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: refuse what a program under test has no business doing."""
    if event.startswith(REFUSED_EVENTS):
        raise PermissionError(f"{event} is refused to model-written programs")
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths: tuple[Any, ...] = (path,) if writes and path != os.devnull else ()
    else:
        paths = arguments[: CHANGED_PATHS.get(event, 0)]
    for path in paths:
        if not isinstance(path, int) and not _lies_in(folder, os.path.realpath(os.fsdecode(path))):
            raise PermissionError(f"{event} outside the program's folder is refused to model-written programs")


def _lies_in(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


if __name__ == "__main__":
    run_contained(json.loads(sys.argv[1]))
