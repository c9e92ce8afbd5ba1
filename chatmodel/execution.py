"""What does a program that a model wrote do, when it runs where accidents stay small?

This is containment against accidents and simple malice, **not a security sandbox**. What holds a program:

- its own process and process group, killed at the time limit; an empty environment, no input, a temporary folder;
- limits on CPU seconds, address space, file size, open files and (except for root) processes;
- an audit hook: starting processes, sockets, foreign signals, native libraries, reading outside Python's own library
  and writing outside the program's folder raise `PermissionError`;
- on Linux, where the system allows user namespaces: no network device, and a process namespace that dies with it;
- on Linux from 5.13 on, Landlock: the kernel itself refuses files outside Python's library and the program's folder,
  from 6.7 on TCP, from 6.12 on signals to processes outside.

The hook stops accidents and tells what was refused, but a program that reaches into the interpreter can undo it; the
kernel's measures hold then too. **Not protected against**: weaknesses of the kernel; what the kernel's measures do not
cover where a system offers none of them (then the hook is all there is, and a warning says so); many processes or much
memory over several processes, for the seconds until the time limit, when run as root; using up the disk by many small
files; finding out names and sizes of files, which `stat` tells; whatever lies in Python's own library folder. Run
models that you do not trust in a container or a virtual machine.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("chatmodel")

# Strongest first; each is tried once with an empty program, because containers often forbid some or all of them.
NAMESPACES = (
    ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    ("--user", "--map-root-user", "--net"),
)

# The kernel's constants of Landlock (linux/landlock.h): system calls, and rights to files by version.
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, NO_NEW_PRIVILEGES = 444, 445, 446, 38
READ, WRITE, OF_FILES = 0b1101, 0b110, 0b1100000000000111  # execute, read, list; write, read; all that a file can have
RIGHTS_BY_VERSION = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 4: 2**15 - 1, 5: 2**16 - 1}
# What Python needs to read beside its own library: shared libraries, time zones, random numbers.
READABLE: tuple[str, ...] = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/localtime",
)
READABLE += ("/dev/urandom", "/dev/null", "/System/Library", "/Library/Frameworks")

# Audit events: beginnings of the refused ones; those whose leading arguments (how many) are paths that get changed.
REFUSED_EVENTS: tuple[str, ...] = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
REFUSED_EVENTS += ("subprocess.", "pty.", "socket.", "signal.pthread_kill", "ctypes.", "resource.", "syslog.")
REFUSED_EVENTS += ("gc.get_",)  # by which a program would find the hook
REFUSED_IMPORTS = frozenset({"ctypes", "_ctypes"})
LISTED_PATHS = {"os.listdir": 1, "os.scandir": 1, "os.chdir": 1, "os.getxattr": 1, "os.listxattr": 1}
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
    logger.warning("model-written programs run without namespaces here; other checks, as Landlock, still hold")
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

    code = compile(Path("program.py").read_text(encoding="utf-8"), "program.py", "exec")
    folder = os.path.realpath(os.getcwd())
    readable = [folder, *(os.path.realpath(path) for path in (*sys.path, *READABLE, f"{sys.base_prefix}/lib"))]
    restrict_files(folder, readable)
    _lower_limits(limits)
    status, write = limits["status"], os.write
    module = types.ModuleType("program")
    # The program finds neither this module nor, by name, anything of the hook.
    sys.modules["program"] = sys.modules["__main__"] = module
    sys.addaudithook(make_hook(folder, tuple(readable)))
    exec(code, module.__dict__)
    sys.stdout.flush()
    write(status, b"end")


def restrict_files(folder: str, readable: list[str]) -> int:
    """Let the kernel refuse this process and its children all files but these, and TCP and foreign signals if it can.

    Returns Landlock's version, 0 where there is none.
    """
    if sys.platform != "linux":
        return 0
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    version = max(0, library.syscall(LANDLOCK_CREATE, None, 0, 1))
    if version:
        rights = RIGHTS_BY_VERSION[min(version, max(RIGHTS_BY_VERSION))]
        words = (ctypes.c_uint64 * 3)(rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
        size = 8 * (1 + (version >= 4) + (version >= 6))
        rules = library.syscall(LANDLOCK_CREATE, words, size, 0)
        for path, allowed in [(folder, rights), ("/dev/null", WRITE), *((path, READ) for path in readable)]:
            _allow(library, rules, path, allowed & rights)
        library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if library.syscall(LANDLOCK_RESTRICT, rules, 0) != 0:
            version = 0
        os.close(rules)
    for name in [name for name in sys.modules if name.lstrip("_").startswith("ctypes")]:
        del sys.modules[name]  # a program that imports it meets the hook
    return version


def _allow(library: Any, rules: int, path: str, allowed: int) -> None:
    import struct

    try:
        place = os.open(path, os.O_PATH)
    except OSError:
        return
    rights = allowed if os.path.isdir(path) else allowed & OF_FILES
    library.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


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


def make_hook(folder: str, readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """Audit hook that refuses what a program under test has no business doing.

    What it uses is bound here, so that changed names elsewhere do not change it.
    """
    refused, imports, changed, listed = REFUSED_EVENTS, REFUSED_IMPORTS, dict(CHANGED_PATHS), dict(LISTED_PATHS)
    realpath, fsdecode, null, is_instance, get_any = os.path.realpath, os.fsdecode, os.devnull, isinstance, any
    writing, letters, number = os.O_WRONLY | os.O_RDWR | os.O_CREAT, "wax+", int

    def lies_in(path: Any, folders: tuple[str, ...]) -> bool:
        if is_instance(path, number) or path is None:
            return True  # an open file, or the current folder
        real = realpath(fsdecode(path))
        return get_any(real == place or real.startswith(place + "/") for place in folders)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused) or (event == "import" and arguments[0] in imports):
            raise PermissionError(f"{event} is refused to model-written programs")
        if event == "open":
            path, mode, flags = arguments
            writes = get_any(letter in (mode or "") for letter in letters) or flags & writing
            checked = [(path, (folder,) if writes else readable)] if path != null else []
        else:
            checked = [(path, (folder,)) for path in arguments[: changed.get(event, 0)]]
            checked += [(path, readable) for path in arguments[: listed.get(event, 0)]]
        for path, folders in checked:
            if not lies_in(path, folders):
                raise PermissionError(f"{event} outside the program's folder is refused to model-written programs")

    return refuse


if __name__ == "__main__":
    run_contained(json.loads(sys.argv[1]))
