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


needs_namespaces = pytest.mark.skipif(len(namespace_command()) < 6, reason="the system offers no process namespaces")


@needs_namespaces
def test_the_namespace_itself_has_no_network():
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    answer = subprocess.run([*namespace_command(), sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert "Network is unreachable" in answer.stderr


@needs_namespaces
def test_a_child_that_left_the_group_dies_with_the_program(monkeypatch, tmp_path):
    # Without the audit hook (in a copy of the module), a program forks a process with a session of its own.
    source = Path(execution.__file__).read_text()
    copy = tmp_path / "unhooked.py"
    copy.write_text(source.replace("    sys.addaudithook(", "    str("))
    monkeypatch.setattr(execution, "__file__", str(copy))
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
