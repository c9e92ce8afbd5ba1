"""Model-written programs: what they may do, and what is stopped."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from chatmodel import execution
from chatmodel.execution import execute_python, namespace_command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="model-written programs run on Linux and macOS only")


def run(code: str, **limits):
    return execute_python(textwrap.dedent(code), **limits)


def test_a_program_that_ends_is_a_success():
    result = run("import math\nprint(math.comb(5, 2))")
    assert result.success
    assert (result.stdout, result.stderr, result.exit_code) == ("10\n", "", 0)
    assert not result.timed_out
    assert not result.truncated


def test_a_failed_assertion_is_no_success():
    result = run("assert 1 + 1 == 3, 'arithmetic'")
    assert not result.success
    assert result.exit_code == 1
    assert "AssertionError: arithmetic" in result.stderr


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)"])
def test_leaving_early_with_code_0_is_no_success(code):
    result = run(f"{code}\nassert False, 'never reached'")
    assert result.exit_code == 0
    assert not result.success


def test_a_syntax_error_is_a_failure():
    result = run("def broken(:")
    assert not result.success
    assert "SyntaxError" in result.stderr


def test_main_block_does_not_run_and_dataclasses_work():
    result = run(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int = 1
        print(Point())
        if __name__ == "__main__":
            raise RuntimeError
        """
    )
    assert result.success, result.stderr
    assert result.stdout == "Point(x=1)\n"


def test_endless_loop_is_stopped_in_time():
    result = run("while True: pass", timeout=0.5)
    assert result.timed_out
    assert not result.success
    assert result.seconds < 3


def test_sleeping_and_swallowing_everything_is_stopped_too():
    result = run("import time\nwhile True:\n try: time.sleep(9)\n except BaseException: pass", timeout=0.5)
    assert result.timed_out


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_memory_is_limited():
    result = run("blocks = [bytearray(2**20) for _ in range(2000)]")
    assert not result.success
    assert "MemoryError" in result.stderr
    assert run("blocks = [bytearray(2**20) for _ in range(50)]").success


def test_big_output_is_cut_and_the_program_goes_on():
    result = run("for _ in range(300): print('x' * 9999)\nprint('end')", output_bytes=1000)
    assert result.success
    assert result.truncated
    assert result.stdout == "x" * 1000


def test_big_files_are_refused():
    result = run("open('big', 'wb').write(b'x' * 10_000)", file_bytes=5000)
    assert not result.success
    assert "File too large" in result.stderr


def test_there_is_no_input_and_no_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "told")
    assert "EOFError" in run("input()").stderr
    result = run("import os; print('A_SECRET' in os.environ, 'HOME' in os.environ)")
    assert result.stdout == "False False\n"


def test_files_go_to_a_folder_that_is_gone_afterwards():
    result = run("import os\nopen('made.txt', 'w').write('hi')\nprint(os.getcwd(), open('made.txt').read())")
    folder, text = result.stdout.split()
    assert text == "hi"
    assert folder != os.getcwd()
    assert not os.path.exists(folder)


@pytest.mark.parametrize(
    "code",
    [
        "open(PATH, 'w')",
        "open(PATH, 'r+')",
        "import os; os.open(PATH, os.O_WRONLY)",
        "import os; os.remove(PATH)",
        "import os; os.rename(PATH, 'mine')",
        "import os; os.chmod(PATH, 0)",
        "import os; os.truncate(PATH, 0)",
        "import os, pathlib; os.chdir(pathlib.Path(PATH).parent); open('kept.txt', 'w')",
        "import os; os.symlink(PATH, 'link'); open('link', 'w')",
        "import shutil, pathlib; shutil.rmtree(pathlib.Path(PATH).parent)",
    ],
)
def test_files_elsewhere_are_not_changed(code, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("precious")
    result = run(f"PATH = {str(kept)!r}\n{code}")
    assert kept.read_text() == "precious"
    assert "PermissionError" in result.stderr


def test_the_program_may_clean_up_its_own_folder():
    result = run("import tempfile\nwith tempfile.TemporaryDirectory() as f: open(f + '/x', 'w')\nprint('fine')")
    assert result.stdout == "fine\n", result.stderr


def test_temporary_files_land_in_the_folder():
    result = run("import os, tempfile\nprint(os.path.dirname(tempfile.mkstemp()[1]) == os.getcwd())")
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.system('echo started')",
        "import os; os.execv('/bin/echo', ['echo', 'started'])",
        "import subprocess; subprocess.run(['echo', 'started'])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes",
    ],
)
def test_processes_signals_and_native_code_are_refused(code):
    result = run(code)
    assert not result.success
    assert "PermissionError" in result.stderr
    assert "started" not in result.stdout


def test_network_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        result = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        assert "PermissionError" in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def run_landlock_probe() -> bool:
    """Whether this kernel refuses files, TCP and foreign signals (Landlock of version 6 or later), asked elsewhere."""
    command = f"from importlib.machinery import SourceFileLoader as L; L('e', {execution.__file__!r}).load_module()"
    code = command + ".restrict_files('/tmp', ['/usr', '/']) >= 6 or exit(1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(len(namespace_command()) < 6, reason="the system offers no process namespaces")


@needs_namespaces
def test_the_namespace_itself_has_no_network():
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    answer = subprocess.run([*namespace_command(), sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert "Network is unreachable" in answer.stderr


def without(monkeypatch, tmp_path, *calls):
    """Let programs run under a copy of the module in which these calls do nothing."""
    source = Path(execution.__file__).read_text()
    for call in calls:
        assert f"    {call}(" in source
        source = source.replace(f"    {call}(", "    (lambda *arguments: None)(")
    copy = tmp_path / "weakened.py"
    copy.write_text(source)
    monkeypatch.setattr(execution, "__file__", str(copy))


HOOK, FILES, LIMITS = "sys.addaudithook", "restrict_files", "_lower_limits"
has_landlock = run_landlock_probe()
needs_landlock = pytest.mark.skipif(not has_landlock, reason="this kernel has no Landlock of version 6")


@needs_namespaces
def test_a_child_that_left_the_group_dies_with_the_program(monkeypatch, tmp_path):
    """Without the audit hook a program forks a process with a session of its own."""
    without(monkeypatch, tmp_path, HOOK, FILES)
    code = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            for _ in range(100):
                open({str(tmp_path / "alive")!r}, "a").write("x")
                time.sleep(0.05)
        time.sleep(60)
        """
    assert run(code, timeout=0.7).timed_out
    grown = (tmp_path / "alive").stat().st_size
    assert grown > 0
    time.sleep(0.3)
    assert (tmp_path / "alive").stat().st_size == grown


def harm(code: str, folder: Path, *, seconds: float = 5.0) -> subprocess.CompletedProcess[str]:
    """What a program does in a plain Python process: the harm that is to be contained."""
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)


FORK_BOMB = """
    import os, time
    children = []
    for _ in range(60):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.2)
            os._exit(0)
        children.append(pid)
    print(len(children), flush=True)
    for pid in children:
        os.waitpid(pid, 0)
    """


def test_attack_fork_bomb(tmp_path):
    assert harm(FORK_BOMB, tmp_path).stdout == "60\n"
    result = run(FORK_BOMB)
    assert result.stdout == ""
    assert "os.fork is refused" in result.stderr


@needs_namespaces
def test_attack_fork_bomb_that_outlives_its_parent(monkeypatch, tmp_path):
    """Without the hook the processes exist, but only as long as the program may run."""
    code = """
        import os, time
        for _ in range(20):
            if os.fork() == 0:
                os.setsid()
                time.sleep(97.125)
                os._exit(0)
        time.sleep(97.125)
        """
    before = count_sleepers()
    without(monkeypatch, tmp_path, HOOK)
    assert run(code, timeout=0.5).timed_out
    time.sleep(0.2)
    assert count_sleepers() == before


def count_sleepers() -> int:
    """Processes that run a program of these tests."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += b"weakened.py" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_attack_memory(monkeypatch, tmp_path):
    code = "block = bytearray(400 * 2**20)\nprint(len(block))"
    assert harm(code, tmp_path).stdout == f"{400 * 2**20}\n"
    assert "MemoryError" in run(code).stderr


def test_attack_endless_loop(tmp_path):
    code = "while True: pass"
    with pytest.raises(subprocess.TimeoutExpired):
        harm(code, tmp_path, seconds=0.5)
    assert run(code, timeout=0.5).timed_out


def test_attack_sockets(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2.0)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1).send(b'stolen')"
        harm(code, tmp_path)
        with server.accept()[0] as connection:
            assert connection.recv(9) == b"stolen"
        server.settimeout(0.2)
        assert "PermissionError" in run(code).stderr
        if has_landlock or len(namespace_command()) > 2:  # the system itself refuses too
            without(monkeypatch, tmp_path, HOOK)
            assert "Error" in run(code).stderr
        with pytest.raises(TimeoutError):
            server.accept()


READS_HOME = """
    import os
    print(open(PATH).read(), os.listdir(os.path.dirname(PATH)))
    """


def test_attack_reading_the_home_folder(tmp_path):
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "id_rsa"
    secret.write_text("PRIVATE KEY")
    code = f"PATH = {str(secret)!r}\n" + textwrap.dedent(READS_HOME)
    assert harm(code, tmp_path).stdout == "PRIVATE KEY ['id_rsa']\n"
    for line in (
        "open(PATH)",
        "import os; os.open(PATH, os.O_RDONLY)",
        "import os; os.listdir(os.path.dirname(PATH))",
    ):
        result = run(f"PATH = {str(secret)!r}\n{line}")
        assert "PermissionError" in result.stderr
        assert "PRIVATE" not in result.stdout + result.stderr


@needs_landlock
def test_attack_reading_the_home_folder_is_refused_by_the_kernel(monkeypatch, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    code = f"PATH = {str(secret)!r}\n" + textwrap.dedent(READS_HOME)
    without(monkeypatch, tmp_path, HOOK, FILES)
    assert "PRIVATE KEY" in run(code).stdout
    monkeypatch.undo()
    without(monkeypatch, tmp_path, HOOK)
    assert "Permission denied" in run(code).stderr


KILLS = "import os, signal\nos.kill(PID, signal.SIGTERM)\nprint('killed')"


def test_attack_killing_the_parent(monkeypatch, tmp_path):
    """A process that stands for the parent: the harm is shown on one, the others must live on."""
    victims = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    try:
        assert harm(f"PID = {victims[0].pid}\n{KILLS}", tmp_path).stdout == "killed\n"
        assert victims[0].wait(timeout=5) != 0
        assert "os.kill is refused" in run(f"PID = {victims[1].pid}\n{KILLS}").stderr
        assert "os.kill is refused" in run(KILLS.replace("PID", "os.getppid()")).stderr
        if has_landlock or len(namespace_command()) > 5:  # the system itself refuses too
            without(monkeypatch, tmp_path, HOOK)
            assert "Error" in run(f"PID = {victims[2].pid}\n{KILLS}").stderr
        assert [victim.poll() for victim in victims[1:]] == [None, None]
    finally:
        for victim in victims:
            victim.kill()
            victim.wait()


def test_attack_huge_output(tmp_path):
    code = "import sys\nfor _ in range(300): sys.stdout.write('x' * 100_000)"
    assert len(harm(code, tmp_path).stdout) == 30_000_000
    result = run(code, output_bytes=1000)
    assert result.truncated
    assert len(result.stdout) == 1000


# Undoes the hook from the hook's own frame, reached through the traceback of a refusal, then writes outside.
FRAME_ESCAPE = """
    import builtins, os, posixpath, sys
    def reach():
        try:
            open(PATH, "w")
        except PermissionError as error:
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            return trace.tb_frame
    frame = reach()
    names = {} if frame is None else frame.f_globals
    for name in ("REFUSED_EVENTS", "CHANGED_PATHS", "LISTED_PATHS", "REFUSED_IMPORTS"):
        names[name] = type(names[name])() if name in names else ()
    names["_refuse"] = names["make_hook"] = lambda *arguments: None
    ESCAPE
    open(PATH, "w").write("escaped")
    print("out")
    """
# The same by what the hook calls: `realpath` is made to find every path inside.
PATCHED_REALPATH = """
here = os.getcwd()
posixpath.abspath = lambda path: here + "/x"
"""


def write_escape(path: Path, more: str = "") -> str:
    return f"PATH = {str(path)!r}\n" + textwrap.dedent(FRAME_ESCAPE).replace("ESCAPE", more.strip())


def test_attack_frames(monkeypatch, tmp_path):
    target = tmp_path / "target"
    code = write_escape(target)
    assert "out" in harm(code.replace("reach()\nnames", "None\nnames"), tmp_path).stdout
    assert target.read_text() == "escaped"
    target.unlink()
    assert "PermissionError" in run(code).stderr
    assert not target.exists()


@needs_landlock
def test_attack_frames_that_deceive_the_hook_meet_the_kernel(monkeypatch, tmp_path):
    target = tmp_path / "target"
    code = write_escape(target, PATCHED_REALPATH)
    without(monkeypatch, tmp_path, FILES)
    assert run(code).stdout == "out\n"  # the hook alone is deceived
    assert target.read_text() == "escaped"
    target.unlink()
    monkeypatch.undo()
    assert "Permission denied" in run(code).stderr
    assert not target.exists()


CTYPES = "import ctypes\nprint(ctypes.CDLL(None).getpid())"


def test_attack_ctypes(monkeypatch, tmp_path):
    assert int(harm(CTYPES, tmp_path).stdout) > 0
    for code in (CTYPES, "import _ctypes", "from ctypes import util", "import sys; sys.modules['ctypes']"):
        result = run(code)
        assert not result.success
        assert result.stdout == ""
    native = f"import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.creat({str(tmp_path / 'made').encode()!r}, 0o600))"
    assert int(harm(native, tmp_path).stdout) > 0
    if has_landlock:  # native code is under the kernel's rules, not the hook's
        (tmp_path / "made").unlink()
        without(monkeypatch, tmp_path, HOOK)
        assert run(native).stdout == "-1\n"
        assert not (tmp_path / "made").exists()


def test_without_namespaces_one_warning_and_the_rest_holds(monkeypatch, caplog):
    monkeypatch.setattr(execution, "NAMESPACES", (("--no-such-flag",),))
    namespace_command.cache_clear()
    try:
        assert run("print(1)").success
        assert run("while True: pass", timeout=0.4).timed_out
        assert "PermissionError" in run("import os; os.fork()").stderr
    finally:
        namespace_command.cache_clear()
    assert [record.message for record in caplog.records if "without namespaces" in record.message] != []
    assert len(caplog.records) == 1
